"""Rotary attention, the key-value cache, masks, and the one transformer block that every stack here is made of.

Used by encoder.py, speech_decoder.py and frozen_llm.py (cache only). Masks are drawn in notebooks 02 and 06.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (batch or 1, 1, tokens, head_width / 2)


def rotation(positions: Tensor, head_width: int, base: float = 10_000.0) -> Rotation:
    """Rotary angles of integer positions (batch, tokens) or (tokens,).

    Angles are computed in double precision: at 25 frames a second, an hour of audio reaches position 90,000, where
    single precision would already be wrong in the third decimal.
    """
    where = (
        "cpu" if positions.device.type == "mps" else positions.device
    )  # Apple's GPU has no double precision
    frequencies = base ** (-torch.arange(0, head_width, 2, device=where, dtype=torch.float64) / head_width)
    angles = torch.atleast_2d(positions).to(where, torch.float64)[..., None] * frequencies
    return tuple(f(angles)[:, None].to(positions.device, torch.float32) for f in (torch.cos, torch.sin))


def rotary(x: Tensor, turn: Rotation) -> Tensor:
    """Rotate (batch, heads, tokens, head_width): pair i of each head turns by position * frequency i."""
    cosine, sine = (t.to(x.dtype) for t in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class KVCache:
    """Keys and values of one attention layer, each (batch, heads, length, head_width), without per-step copies.

    The buffer doubles when it is full. With a `window`, only the last `window` entries are kept: they move to the
    front of the buffer once it is full, so the cost per step and the memory stay flat however long the stream is.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.begin = self.end = 0

    def __len__(self) -> int:
        """Entries that the next query can see (before it adds its own)."""
        return self.end - self.begin

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add entries and return views of everything kept plus the new ones."""
        if self.window is not None:
            self.begin = max(self.begin, self.end - self.window)
        added = keys.shape[2]
        self._make_room(keys, values, added)
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.end : self.end + added] = new
        self.end += added
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        return tuple(buffer[:, :, self.begin : self.end] for buffer in self.buffers)

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` entries."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot crop a cache of {len(self)} entries to {length}")
        self.end = self.begin + length

    def fork(self, length: int | None = None) -> "KVCache":
        """An independent cache with the first `length` entries, or all (one copy of what is in use)."""
        twin = KVCache(self.window)
        if self.buffers is not None:
            twin.append(*(entries[:, :, :length] for entries in self.view()))
        return twin

    def nbytes(self) -> int:
        """Bytes held by the two buffers, room to grow included."""
        return sum(buffer.nbytes for buffer in self.buffers) if self.buffers else 0

    def _make_room(self, keys: Tensor, values: Tensor, added: int) -> None:
        if self.buffers is not None and self.end + added <= self.buffers[0].shape[2]:
            return
        kept = len(self)
        capacity = max(64, 2 * (kept + added), 8 * (self.window or 0))
        old = self.view() if self.buffers is not None else None
        fresh = tuple(new.new_empty(*new.shape[:2], capacity, new.shape[3]) for new in (keys, values))
        for buffer, entries in zip(fresh, old or (), strict=False):
            buffer[:, :, :kept] = entries
        self.buffers, self.begin, self.end = fresh, 0, kept


def chunk_mask(frames: int, chunk_frames: int, left_chunks: int | None = None) -> Tensor:
    """Which frames may attend to which in the chunk-wise streaming encoder.

    Paper: "Chunk-wise Streaming Speech Encoder". A frame sees its whole chunk and `left_chunks` chunks before it
    (None: all of them). Returns bool (frames, frames), True where attention is allowed. Raises ValueError if
    chunk_frames < 1.

    >>> chunk_mask(4, chunk_frames=2, left_chunks=0).int()[0].tolist()
    [1, 1, 0, 0]
    """
    if chunk_frames < 1:
        raise ValueError(f"a chunk needs at least 1 frame, got {chunk_frames}")
    chunk = torch.arange(frames) // chunk_frames
    behind = chunk[:, None] - chunk[None, :]
    return (behind >= 0) & (behind <= (frames if left_chunks is None else left_chunks))


def causal_mask(queries: int, keys: int) -> Tensor:
    """Bool (queries, keys): the last query sees all keys, each earlier one a key less."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def lengths_mask(lengths: Tensor, size: int) -> Tensor:
    """Bool (batch, size), True for the first `lengths[b]` places of row b."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


class TransformerBlock(nn.Module):
    """Pre-norm block: rotary self-attention, then a feed-forward layer, each added to its input.

    gated     True: RMSNorm and SwiGLU as in Llama (the speech decoder); False: LayerNorm, two linear layers and a
              ReLU (the encoder)
    """

    def __init__(
        self, width: int, heads: int, feed_forward_width: int, gated: bool = True, dropout: float = 0.0
    ):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not split into {heads} heads of even width")
        self.heads, self.head_width, self.gated = heads, width // heads, gated
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.attention_norm = norm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.feed_forward_norm = norm(width, eps=1e-6)
        self.up = nn.Linear(width, feed_forward_width, bias=False)
        self.gate = nn.Linear(width, feed_forward_width, bias=False) if gated else None
        self.down = nn.Linear(feed_forward_width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, turn: Rotation, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(batch, tokens, width) -> the same shape.

        mask   bool, broadcast to (batch, heads, tokens, keys), True where attention is allowed; None: everywhere
        cache  earlier keys and values; those of x are appended
        """
        x = x + self.dropout(self.attend(self.attention_norm(x), turn, mask, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def attend(self, x: Tensor, turn: Rotation, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        query = rotary(self.split_heads(self.query(x)), turn)
        keys, values = self.keys_and_values(x, turn)
        if cache is not None:
            keys, values = cache.append(keys, values)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def keys_and_values(self, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (batch, heads, tokens, head_width) of the normed input."""
        return rotary(self.split_heads(self.key(x)), turn), self.split_heads(self.value(x))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.up(x) if self.gated else F.relu(self.up(x))
        return self.down(hidden)
