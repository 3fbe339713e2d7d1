"""From encoder frames to the frozen LLM's input: the adapter, the trained embeddings, the warm start.

Paper: "Chunk-wise Streaming Speech Encoder" (adapter) and "Training strategy of the speech input". Notebooks
03, 04.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .audio import ADAPTER_DOWNSAMPLING
from .chunk import StreamingConv1d
from .encoder import ctc_loss
from .errors import InputError
from .text import collapse


class Adapter(nn.Module):
    """A causal strided convolution and a projection: 25 Hz frames -> 12.5 Hz vectors of the LLM's width.

    The output is layer-normed and scaled to the root-mean-square of the LLM's own embeddings (ours: the
    released adapter ends in the projection), so that the LLM never meets vectors of a size it has not seen.
    """

    embedding_rms: Tensor

    def __init__(
        self, encoder_width: int, adapter_width: int, llm_width: int, embedding_rms: float, kernel: int = 5
    ) -> None:
        super().__init__()
        self.convolution = StreamingConv1d(encoder_width, adapter_width, kernel, stride=ADAPTER_DOWNSAMPLING)
        self.norm = nn.LayerNorm(adapter_width)
        self.project = nn.Linear(adapter_width, llm_width)
        self.output_norm = nn.LayerNorm(llm_width)
        self.register_buffer("embedding_rms", torch.tensor(float(embedding_rms)))

    @classmethod
    def from_preset(cls, preset: Any, encoder_width: int, llm_width: int, embedding_rms: float) -> "Adapter":
        """The adapter of a preset of stage encoder_adapter."""
        return cls(encoder_width, preset.adapter_width, llm_width, embedding_rms, preset.adapter_kernel)

    def forward(self, frames: Tensor, frame_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, frames, encoder_width) -> (batch, frames / 2, llm_width), vector_lengths (batch,)."""
        if frame_lengths is None:
            frame_lengths = torch.full((frames.shape[0],), frames.shape[1], device=frames.device)
        vectors = self.rest(self.convolution(frames.transpose(1, 2)))
        return vectors, (frame_lengths + ADAPTER_DOWNSAMPLING - 1) // ADAPTER_DOWNSAMPLING

    def start(self, batch: int = 1) -> dict[str, Tensor]:
        return self.convolution.start(batch)

    def step(self, frames: Tensor, state: dict[str, Tensor]) -> Tensor:
        """An even number of frames (batch, frames, encoder_width) -> (batch, frames / 2, llm_width)."""
        if frames.shape[1] % ADAPTER_DOWNSAMPLING:
            raise ValueError(f"got {frames.shape[1]} frames, expected a multiple of {ADAPTER_DOWNSAMPLING}")
        return self.rest(self.convolution.step(frames.transpose(1, 2), state))

    def rest(self, convolved: Tensor) -> Tensor:
        """What follows the convolution; frame by frame, so the same for a stream."""
        x = self.project(F.gelu(self.norm(convolved.transpose(1, 2))))
        return self.output_norm(x) * self.embedding_rms


class TrainedEmbedding(nn.Module):
    """A few trained vectors that stand in the LLM's input like words.

    table   the LLM's embedding table (vocabulary, width): random rows of it are the starting values, so that
    training
            begins among vectors the LLM knows; without it they start small and random
    """

    def __init__(
        self, count: int, width: int, table: Tensor | None = None, generator: torch.Generator | None = None
    ):
        super().__init__()
        if table is None:
            start = 0.02 * torch.randn(count, width, generator=generator)
        else:
            rows = torch.randint(len(table), (count,), generator=generator)
            start = table.detach()[rows.to(table.device)].float().cpu().clone()
        self.vectors = nn.Parameter(start)

    def forward(self, batch: int = 1) -> Tensor:
        """-> (batch, count, width), the same vectors for every row."""
        return self.vectors[None].expand(batch, -1, -1)


class PromptEmbedding(TrainedEmbedding):
    """Before every question of a dialogue: "answer this" (stage 3; 25 vectors in the released model)."""


class TaskEmbedding(TrainedEmbedding):
    """Before an utterance to be recognised: "write this down" (stage 2, the paper's special tokens)."""


class TokenCTC(nn.Module):
    """CTC over the LLM's own tokens: the adapter speaks the LLM's language before the LLM is asked.

    Scores are cosines between adapter vectors and the LLM's frozen embedding rows, times `temperature`. Only
    one blank vector is trained here. Ours: with the LLM loss alone, alignment does not come about in
    reasonable time.

    table       the LLM's embeddings (vocabulary, width)
    token_ids   the tokens that can be written, each once; usually all that occur in the training transcripts
    """

    token_ids: Tensor
    rows: Tensor

    def __init__(self, table: Tensor, token_ids: list[int], temperature: float = 15.0) -> None:
        super().__init__()
        ids = torch.tensor(sorted(set(token_ids)), dtype=torch.long)
        rows = table.detach()[ids.to(table.device)].float().cpu()
        self.temperature = temperature
        self.register_buffer("token_ids", ids)  # saved: weights of another token list must not load
        self.register_buffer("rows", F.normalize(rows, dim=-1), persistent=False)  # the LLM's, so not saved
        self.blank = nn.Parameter(torch.randn(table.shape[1]) / table.shape[1] ** 0.5)
        self.index = {token: place for place, token in enumerate(ids.tolist(), start=1)}

    def forward(self, vectors: Tensor) -> Tensor:
        """(batch, vectors, width) -> log probabilities (batch, vectors, 1 + tokens), blank first."""
        choices = torch.cat([F.normalize(self.blank, dim=-1)[None], self.rows])
        return (self.temperature * F.normalize(vectors.float(), dim=-1) @ choices.T).log_softmax(-1)

    def loss(self, vectors: Tensor, vector_lengths: Tensor, token_id_lists: list[list[int]]) -> Tensor:
        """CTC loss in nats per token.

        Lists longer than their row allows are skipped: encoder.infeasible_share says how many.
        Raises InputError for a token that is not in the list.
        """
        with torch.autocast(vectors.device.type, enabled=False):  # cosines of near neighbours need the digits
            return ctc_loss(self(vectors), vector_lengths, [self.places(ids) for ids in token_id_lists])

    def places(self, token_ids: list[int]) -> list[int]:
        unknown = [token for token in token_ids if token not in self.index]
        if unknown:
            raise InputError(
                f"token {unknown[0]} is not among the {len(self.index)} tokens of this CTC: "
                "build it from the ids of all training transcripts."
            )
        return [self.index[token] for token in token_ids]

    def greedy(self, vectors: Tensor, vector_lengths: Tensor) -> list[list[int]]:
        """The likeliest token of every vector, repeats and blanks removed: ids of the LLM's tokenizer."""
        best = self(vectors).argmax(-1).tolist()
        kept = [collapse(row[:length]) for row, length in zip(best, vector_lengths.tolist(), strict=True)]
        tokens = self.token_ids.tolist()
        return [[tokens[place - 1] for place in row] for row in kept]
