"""The chunk-wise streaming speech encoder, 100 Hz log-mels in, 25 Hz frames out, and its CTC head.

Paper: "Chunk-wise Streaming Speech Encoder". Trained in notebook 02, trained further in 03, frozen
afterwards. A frame sees its own 160 ms chunk and 16 chunks before it, so the encoder waits for nothing beyond
the chunk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache, Rotation, TransformerBlock, chunk_mask, lengths_mask, rotation
from .audio import ENCODER_DOWNSAMPLING, N_MELS
from .chunk import StreamingConv1d
from .text import BLANK, collapse

CARRY_MELS = 3  # what two 3-wide, 2-strided convolutions need of the chunk before: 3 + 16 mels -> 4 frames
FULL_CONTEXT = 0  # as chunk_frames: no chunks, every frame sees the whole utterance
ALL_LEFT = -1  # as left_chunks: every earlier chunk
SIZES = ("width", "layers", "heads", "feed_forward_width", "subsampling_channels", "convolution_kernel")
CONTEXT = ("dropout", "chunk_frames", "left_chunks", "dynamic_chunk_frames_max")


class GlobalNormalization(nn.Module):
    """Each mel band to mean 0 and deviation 1, by corpus statistics that are saved with the weights."""

    mean: Tensor
    inverse_deviation: Tensor

    def __init__(self, mels: int = N_MELS) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(mels))
        self.register_buffer("inverse_deviation", torch.ones(mels))

    def forward(self, mels: Tensor) -> Tensor:
        """(..., mels) -> the same shape."""
        return (mels - self.mean) * self.inverse_deviation

    @torch.no_grad()
    def fit(self, utterances: Iterable[Tensor]) -> "GlobalNormalization":
        """Measure the statistics over tensors (..., frames, mels). Raises ValueError if there is no frame."""
        count, total, squares = 0, 0.0, 0.0
        for mels in utterances:
            frames = mels.reshape(-1, mels.shape[-1]).cpu().double()  # a long sum of squares needs the digits
            count, total, squares = (
                count + len(frames),
                total + frames.sum(0),
                squares + frames.square().sum(0),
            )
        if not count:
            raise ValueError("normalisation statistics need at least one mel frame")
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(1e-6)
        self.mean.copy_(mean)
        self.inverse_deviation.copy_(variance.rsqrt())
        return self


class ConvSubsampling(nn.Module):
    """Two strided convolutions over time and frequency: four mel frames become one encoder frame.

    Without padding: frame j sees mels 4j - 3 to 4j + 3, counted from the first real mel.
    """

    def __init__(self, channels: int, width: int, mels: int = N_MELS) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, kernel_size=3, stride=2)
        self.second = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        bands = ((mels - 1) // 2 - 1) // 2
        self.out = nn.Linear(channels * bands, width)

    def forward(self, mels: Tensor) -> Tensor:
        """(batch, 3 + 4 * frames, mels) -> (batch, frames, width)."""
        x = F.relu(self.first(mels[:, None]))
        x = F.relu(self.second(x))
        return self.out(x.transpose(1, 2).flatten(2))


@dataclass
class BlockState:
    """What one block remembers: keys and values of the left chunks, and the convolution's last inputs."""

    cache: KVCache
    convolution: dict[str, Tensor] | None


class EncoderBlock(nn.Module):
    """A transformer block, after a causal depthwise convolution if its kernel is longer than 1.

    The convolution is ours (the released encoder has none): at small widths it learns local order much
    sooner.
    """

    def __init__(self, width: int, heads: int, feed_forward_width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.convolution_norm = nn.LayerNorm(width, eps=1e-6) if kernel > 1 else None
        self.convolution = StreamingConv1d(width, width, kernel, groups=width) if kernel > 1 else None
        self.transformer = TransformerBlock(width, heads, feed_forward_width, gated=False, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, turn: Rotation, mask: Tensor | None = None, state: BlockState | None = None
    ) -> Tensor:
        """(batch, frames, width) -> the same shape."""
        if self.convolution is not None:
            x = x + self.dropout(self.convolve(self.convolution_norm(x), state))
        return self.transformer(x, turn, mask, state.cache if state else None)

    def convolve(self, x: Tensor, state: BlockState | None) -> Tensor:
        x = x.transpose(1, 2)
        y = self.convolution.step(x, state.convolution) if state else self.convolution(x)
        return y.transpose(1, 2)

    def start(self, batch: int, window: int | None) -> BlockState:
        return BlockState(
            KVCache(window), self.convolution.start(batch) if self.convolution is not None else None
        )


@dataclass
class EncoderState:
    """One stream: last 3 normalised mels (batch, 3, mels), a state for each block, frames so far."""

    chunk_frames: int
    carry: Tensor
    blocks: list[BlockState]
    frames: int = 0

    def nbytes(self) -> int:
        """Bytes that the stream holds; flat once the left context is full."""
        convolutions = sum(b.convolution["carry"].nbytes for b in self.blocks if b.convolution)
        return self.carry.nbytes + convolutions + sum(b.cache.nbytes() for b in self.blocks)


class Encoder(nn.Module):
    """Normalisation, 4x subsampling, chunk-masked blocks with rotary positions, final norm.

    chunk_frames               encoder frames (40 ms) in a chunk
    left_chunks                earlier chunks that a frame sees
    dynamic_chunk_frames_max   longest chunk of `draw_chunk_frames`
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        feed_forward_width: int,
        subsampling_channels: int,
        convolution_kernel: int = 1,
        dropout: float = 0.0,
        chunk_frames: int = 4,
        left_chunks: int = 16,
        dynamic_chunk_frames_max: int = 25,
    ) -> None:
        super().__init__()
        self.width, self.head_width = width, width // heads
        self.chunk_frames, self.left_chunks = chunk_frames, left_chunks
        self.dynamic_chunk_frames_max = dynamic_chunk_frames_max
        self.normalization = GlobalNormalization()
        self.subsampling = ConvSubsampling(subsampling_channels, width)
        self.dropout = nn.Dropout(dropout)
        sizes = (width, heads, feed_forward_width, convolution_kernel, dropout)
        self.blocks = nn.ModuleList(EncoderBlock(*sizes) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def from_preset(cls, preset: Any) -> "Encoder":
        """The encoder of a preset of stage encoder_ctc."""
        return cls(**{name: getattr(preset, name) for name in SIZES + CONTEXT})

    def forward(
        self,
        mels: Tensor,
        mel_lengths: Tensor | None = None,
        chunk_frames: int | None = None,
        left_chunks: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(batch, mel_frames, mels) -> frames (batch, frames, width) and frame_lengths (batch,).

        mel_lengths    mel frames of each row without padding; None: all of them
        chunk_frames   None: as trained; 0: full context
        left_chunks    None: as trained; -1: every earlier chunk

        Raises ValueError unless mel_frames is a positive multiple of 4 (pad waveforms with
        audio.pad_to_chunks).
        """
        check_multiple(mels.shape[1], ENCODER_DOWNSAMPLING)
        if mel_lengths is None:
            mel_lengths = torch.full((mels.shape[0],), mels.shape[1], device=mels.device)
        x = self.subsampling(F.pad(self.normalization(mels), (0, 0, CARRY_MELS, 0)))
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # only the matrix products are short, the residual sum keeps its digits
        x = self.dropout(x)
        frame_lengths = mel_lengths // ENCODER_DOWNSAMPLING
        mask = self.mask(frame_lengths, x.shape[1], chunk_frames, left_chunks)
        turn = rotation(torch.arange(x.shape[1], device=x.device), self.head_width)
        for block in self.blocks:
            x = block(x, turn, mask)
        return self.norm(x), frame_lengths

    def mask(
        self, frame_lengths: Tensor, frames: int, chunk_frames: int | None, left_chunks: int | None
    ) -> Tensor:
        """Bool (batch, 1, frames, frames), True where attention is allowed.

        Padding sees itself, for a row without any True would turn into NaN and spoil the gradients.
        """
        chunk_frames, left_chunks = self.context(chunk_frames, left_chunks)
        device = frame_lengths.device
        allowed = lengths_mask(frame_lengths, frames)[:, None, None, :]
        if chunk_frames != FULL_CONTEXT:
            allowed = allowed & chunk_mask(frames, chunk_frames, left_chunks).to(device)
        return allowed | torch.eye(frames, dtype=torch.bool, device=device)

    def context(self, chunk_frames: int | None, left_chunks: int | None) -> tuple[int, int | None]:
        """The chunk size and left context asked for; a left context of None means everything."""
        chunk_frames = self.chunk_frames if chunk_frames is None else chunk_frames
        left_chunks = self.left_chunks if left_chunks is None else left_chunks
        return chunk_frames, None if left_chunks == ALL_LEFT else left_chunks

    def draw_chunk_frames(self, generator: torch.Generator | None = None) -> int:
        """A chunk size for one training batch: half the time full context (0), else 1 to the largest, evenly.

        Paper: dynamic-chunk training, so that one model may run with any chunk size later.
        """
        if torch.rand((), generator=generator) < 0.5:
            return FULL_CONTEXT
        return int(torch.randint(1, self.dynamic_chunk_frames_max + 1, (), generator=generator))

    def start(
        self, batch: int = 1, chunk_frames: int | None = None, left_chunks: int | None = None
    ) -> EncoderState:
        """A new stream. Raises ValueError for full context: a stream has no end to wait for."""
        chunk_frames, left_chunks = self.context(chunk_frames, left_chunks)
        if chunk_frames == FULL_CONTEXT:
            raise ValueError("an encoder with full context cannot stream: give chunk_frames of 1 or more")
        window = None if left_chunks is None else left_chunks * chunk_frames
        carry = self.norm.weight.new_zeros(batch, CARRY_MELS, len(self.normalization.mean))
        return EncoderState(chunk_frames, carry, [block.start(batch, window) for block in self.blocks])

    @torch.no_grad()
    def step(self, mels: Tensor, state: EncoderState) -> Tensor:
        """Whole chunks (batch, 16 * chunks, mels) -> (batch, 4 * chunks, width)."""
        size = state.chunk_frames * ENCODER_DOWNSAMPLING
        check_multiple(mels.shape[1], size)
        return torch.cat([self.step_chunk(chunk, state) for chunk in mels.split(size, dim=1)], dim=1)

    def step_chunk(self, mels: Tensor, state: EncoderState) -> Tensor:
        """One chunk: all that the cache holds may be seen, so no mask is needed."""
        joined = torch.cat([state.carry, self.normalization(mels)], dim=1)
        state.carry = joined[:, -CARRY_MELS:]
        x = self.subsampling(joined)
        positions = torch.arange(state.frames, state.frames + x.shape[1], device=x.device)
        turn = rotation(positions, self.head_width)
        for block, block_state in zip(self.blocks, state.blocks, strict=True):
            x = block(x, turn, state=block_state)
        state.frames += x.shape[1]
        return self.norm(x)


def check_multiple(mel_frames: int, size: int) -> None:
    if mel_frames < size or mel_frames % size:
        raise ValueError(
            f"got {mel_frames} mel frames, expected a multiple of {size}: pad with audio.pad_to_chunks"
        )


class CTCHead(nn.Module):
    """Characters from encoder frames: one linear layer to `units` plus the blank (index 0)."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, units + 1)

    @classmethod
    def from_preset(cls, preset: Any) -> "CTCHead":
        """The head of a preset of stage encoder_ctc."""
        return cls(preset.width, preset.ctc_units)

    def forward(self, frames: Tensor) -> Tensor:
        """(batch, frames, width) -> log probabilities (batch, frames, 1 + units) in single precision."""
        return self.linear(frames).float().log_softmax(-1)

    def loss(self, frames: Tensor, frame_lengths: Tensor, targets: list[list[int]]) -> Tensor:
        """CTC loss of unit ids (1 and up) in nats per unit."""
        return ctc_loss(self(frames), frame_lengths, targets)

    def greedy(self, frames: Tensor, frame_lengths: Tensor) -> list[list[int]]:
        """The likeliest unit of every frame, repeats and blanks removed."""
        best = self(frames).argmax(-1).tolist()
        return [collapse(ids[:length]) for ids, length in zip(best, frame_lengths.tolist(), strict=True)]


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: list[list[int]]) -> Tensor:
    """Connectionist temporal classification over (batch, time, 1 + units), in nats per unit.

    Targets that do not fit into their row (see ctc_fits) count neither in the sum nor in the mean.
    """
    flat = torch.tensor([unit for row in targets for unit in row], dtype=torch.long, device=log_probs.device)
    counts = torch.tensor([len(row) for row in targets], device=log_probs.device)
    losses = F.ctc_loss(
        log_probs.transpose(0, 1), flat, lengths, counts, blank=BLANK, reduction="none", zero_infinity=True
    )
    fits = torch.tensor(ctc_fits(lengths, targets), device=log_probs.device)
    return losses.sum() / (counts * fits).sum().clamp_min(1)


def ctc_fits(lengths: Tensor, targets: list[list[int]]) -> list[bool]:
    """Whether each target fits its row: a frame for each unit, and a blank between equal neighbours."""
    needed = (len(row) + sum(a == b for a, b in pairwise(row)) for row in targets)
    return [length >= need for length, need in zip(lengths.tolist(), needed, strict=True)]


def infeasible_share(lengths: Tensor, targets: list[list[int]]) -> float:
    """The share of targets that CTC skips because they are longer than their row; shown beside the loss."""
    fits = ctc_fits(lengths, targets)
    return 1 - sum(fits) / len(fits) if fits else 0.0
