"""The acoustic gate: Silero VAD opens a turn, and nothing else. Closing it is the state head's work.

Paper: "Duplex": the VAD only detects the start of speech. Released constants: threshold 0.8, time-out 2 s.
"""

import torch
from torch import Tensor

from .audio import CHUNK_MS, CHUNK_SAMPLES, exact, pad_to_chunks

WINDOW_SAMPLES = 512  # what Silero takes at 16 kHz
WINDOWS_PER_CHUNK = exact(CHUNK_SAMPLES, WINDOW_SAMPLES)  # 5
SILERO_MEMORY = ("_state", "_context", "_last_sr", "_last_batch_size")
LOOK_BACK_CHUNKS = 6  # 960 ms before the opening are replayed, so that no first word is lost


class SpeechGate:
    """Silero VAD of one session: `step` tells whether a chunk has speech, `silence_ms` how long there was none.

    threshold  probability above which a 32 ms window counts as speech
    windows    such windows in a row that open the gate: four, for a blip of 60 ms is heard in two or three
    """

    def __init__(self, threshold: float = 0.5, windows: int = 4) -> None:
        from silero_vad import load_silero_vad

        self.model, self.threshold, self.windows = load_silero_vad(onnx=False), threshold, windows
        self.silence_ms = self.row = 0  # `row`: windows of speech in a row, up to now

    def step(self, samples: Tensor) -> bool:
        """One 160 ms chunk (2560 samples,) at 16 kHz."""
        with torch.inference_mode():
            scores = [
                float(self.model(window, 16_000))
                for window in samples.view(WINDOWS_PER_CHUNK, WINDOW_SAMPLES)
            ]
        longest = 0
        for score in scores:  # a row may have begun in the chunk before
            self.row = self.row + 1 if score > self.threshold else 0
            longest = max(longest, self.row)
        speech = longest >= self.windows
        self.silence_ms = 0 if speech else self.silence_ms + CHUNK_MS
        return speech

    def reset(self) -> None:
        """Forget everything heard: after a decision the next turn starts fresh."""
        self.model.reset_states()
        self.silence_ms = self.row = 0

    def remember(self) -> dict[str, Tensor]:
        """All that the gate knows of what it heard, to be saved."""
        known = {name: torch.as_tensor(getattr(self.model, name)).clone() for name in SILERO_MEMORY}
        return known | {name: torch.tensor(getattr(self, name)) for name in ("silence_ms", "row")}

    def restore(self, known: dict[str, Tensor]) -> None:
        """Go on from what another gate remembered."""
        self.silence_ms, self.row = int(known["silence_ms"]), int(known["row"])
        for name in SILERO_MEMORY:
            value = known[name]
            setattr(self.model, name, value if value.dim() else int(value))


def opening(waveform: Tensor, gate: SpeechGate) -> int | None:
    """Index of the 160 ms chunk of a waveform (samples,) that opens a fresh gate; None if it stays shut."""
    gate.reset()
    chunks = pad_to_chunks(waveform).view(-1, CHUNK_SAMPLES)
    return next((number for number, chunk in enumerate(chunks) if gate.step(chunk)), None)
