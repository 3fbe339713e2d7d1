"""What the listening side makes of one recorded turn, computed at once: training hears what a live session hears.

Paper: "Duplex". The gate opens a turn, the 960 ms before it are replayed, then chunk follows chunk. A test compares
this with dialogue.Session. Used by notebooks 04 and 08.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .audio import LLM_VECTORS_PER_CHUNK, MEL_FRAMES_PER_CHUNK, pad_to_chunks
from .duplex import Timeline, label_chunks
from .frozen_llm import IGNORE
from .vad import LOOK_BACK_CHUNKS, SpeechGate, opening


@dataclass
class Heard:
    """One turn as the LLM gets it: vectors (2 * chunks, width) from chunk `first` of the recording on.

    opened   chunk of the recording at which the gate opened; states before it are never asked for
    labels   (chunks,) dialogue state of every chunk, IGNORE where none is asked for
    """

    vectors: Tensor
    first: int
    opened: int
    labels: Tensor

    def until(self, chunk: int) -> "Heard":
        """The same turn, ended after `chunk` of the recording."""
        kept = chunk + 1 - self.first
        vectors = self.vectors[: LLM_VECTORS_PER_CHUNK * kept]
        return Heard(vectors, self.first, self.opened, self.labels[:kept])


def chunk_labels(timeline: Timeline, chunks: int, first: int, opened: int, **rules: int) -> Tensor:
    """duplex.label_chunks from chunk `first` on, where the chunks that are only replayed carry no label.

    If the gate opens after the decision is due, the first chunk it hears carries the decision.
    """
    labels = label_chunks(timeline, chunks, **rules)
    if labels[opened] == IGNORE:
        labels[opened] = labels[: opened + 1].max()
    labels[:opened] = IGNORE
    return labels[first:]


class Listener(nn.Module):
    """Features, encoder and adapter, frozen, behind the gate."""

    def __init__(self, features: nn.Module, encoder: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.features, self.encoder, self.adapter = features, encoder, adapter
        self.requires_grad_(False).eval()
        self.gate = SpeechGate()

    @torch.no_grad()
    def hear(self, waveform: Tensor, timeline: Timeline, **rules: int) -> Heard | None:
        """A recording (samples,) at 16 kHz and what happens in it -> Heard; None if the gate never opens.

        rules   decision_delay_ms, timeout_ms and decision_chunks of duplex.label_chunks
        """
        opened = opening(waveform, self.gate)
        if opened is None:
            return None
        first = max(0, opened - LOOK_BACK_CHUNKS)
        device = next(self.encoder.parameters()).device
        mels = self.features(pad_to_chunks(waveform)[None].to(device))
        chunks = mels.shape[1] // MEL_FRAMES_PER_CHUNK
        frames, frame_lengths = self.encoder(mels[:, MEL_FRAMES_PER_CHUNK * first :])
        vectors, _ = self.adapter(frames, frame_lengths)
        labels = chunk_labels(timeline, chunks, first, opened, **rules)
        return Heard(vectors[0], first, opened, labels)
