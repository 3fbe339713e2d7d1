"""LLaMA-Omni's way to speak, on our parts: stretch the LLM's hidden states, name all units at once with CTC.

Paper: LLaMA-Omni (arXiv 2409.06666), "Speech Decoder". No token waits for the one before it: every hidden state
is repeated `ratio` times, causal blocks read the result, and each place names a unit or a blank. Repeats are
merged and blanks dropped, so there must be at least as many places as units (plus one between equal neighbours).
Row i is the hidden state at answer token i, in training and in speech alike. Used by notebook 11.

One difference: a learned vector stands before the first place. Without it the places of the first hidden state
see nothing but copies of it, whatever their position, so all of them must name the same id.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache, TransformerBlock, causal_mask, lengths_mask, rotation
from .errors import InputError


def upsample(hidden_states: Tensor, lengths: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Repeat each of (batch, tokens, width) `ratio` times: place j copies token j // ratio.

    >>> upsample(torch.tensor([[[1.0], [2.0]]]), torch.tensor([2]), ratio=3)[0].flatten().tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    """
    return hidden_states.repeat_interleave(ratio, dim=1), lengths * ratio


def merge_repeats(codes: list[int]) -> tuple[list[int], list[int]]:
    """Codes without equal neighbours, and how long each lasted (the durations a CTC decoder cannot tell).

    >>> merge_repeats([7, 7, 7, 2, 2, 7])
    ([7, 2, 7], [3, 2, 1])
    """
    units: list[int] = []
    durations: list[int] = []
    for code in codes:
        if units and units[-1] == code:
            durations[-1] += 1
        else:
            units.append(code)
            durations.append(1)
    return units, durations


def expand(units: list[int], durations: list[int]) -> list[int]:
    """The inverse of merge_repeats.

    >>> expand([7, 2], [3, 1])
    [7, 7, 7, 2]
    """
    return [unit for unit, duration in zip(units, durations, strict=True) for _ in range(duration)]


class CTCCollapse:
    """Merge repeats, then drop blanks; piece by piece, as a stream needs it: extended, never revised.

    >>> collapse = CTCCollapse(blank=9)
    >>> collapse.push([9, 4, 4]), collapse.push([4, 9, 4])
    ([4], [4])
    """

    def __init__(self, blank: int) -> None:
        self.blank, self.last = blank, blank

    def push(self, ids: list[int]) -> list[int]:
        """The units that these new ids add."""
        units = []
        for unit in ids:
            if unit not in (self.last, self.blank):
                units.append(unit)
            self.last = unit
        return units


def ctc_collapse(ids: list[int], blank: int) -> list[int]:
    """The units of a whole row of ids.

    >>> ctc_collapse([4, 4, 9, 4, 7], blank=9)
    [4, 4, 7]
    """
    return CTCCollapse(blank).push(ids)


def places_needed(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """(batch,) places that CTC needs for (batch, units): the units, and a blank between equal neighbours."""
    equal = targets[:, 1:] == targets[:, :-1]
    inside = lengths_mask((target_lengths - 1).clamp(min=0), equal.shape[1])
    return target_lengths + (equal & inside).sum(dim=1)


def feasible(upsampled_length: int, target: list[int]) -> bool:
    """Whether CTC can write `target` on that many places.

    >>> feasible(3, [5, 6, 6]), feasible(4, [5, 6, 6])
    (False, True)
    """
    row = torch.tensor([target], dtype=torch.long)
    return upsampled_length >= int(places_needed(row, torch.tensor([len(target)])))


class CTCSpeechDecoder(nn.Module):
    """LLM hidden_states (batch, tokens, llm_width) -> logits (batch, tokens * ratio, units + 1), blank last.

    ratio   places for each hidden state; the paper's is 25, with units at 50 Hz and repeats merged
    """

    def __init__(
        self,
        llm_width: int,
        units: int,
        ratio: int,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        feed_forward_width: int = 688,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ratio, self.blank, self.head_width = ratio, units, width // heads
        self.projection = nn.Linear(llm_width, width)
        sizes = (width, heads, feed_forward_width)
        self.begin = nn.Parameter(torch.randn(width) / width**0.5)
        self.blocks = nn.ModuleList(TransformerBlock(*sizes, dropout=dropout) for _ in range(layers))
        self.output = nn.Linear(width, units + 1)

    def forward(
        self, hidden_states: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor
    ) -> dict[str, Tensor]:
        """CTC on targets (batch, units), repeats merged or not.

        Returns loss (summed over the batch, divided by the number of target units) and blank_rate: the share
        of places whose likeliest id is the blank. A rate that stays at 1 is the usual way in which CTC fails.
        Raises InputError if a row has too few places.
        """
        logits, places = self.logits(hidden_states, lengths)
        self.require_feasible(places, targets, target_lengths)
        scores = logits.float().log_softmax(dim=-1).transpose(0, 1)
        # Padded targets may hold any number: the loss reads target_lengths of each row, so this 0 is no unit.
        targets = targets.masked_fill(~lengths_mask(target_lengths, targets.shape[1]), 0)
        summed = F.ctc_loss(scores, targets, places, target_lengths, blank=self.blank, reduction="sum")
        silent = (logits.argmax(dim=-1) == self.blank)[lengths_mask(places, logits.shape[1])]
        return {"loss": summed / target_lengths.sum().clamp(min=1), "blank_rate": silent.float().mean()}

    def logits(self, hidden_states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every place, and (batch,) valid places. Padding stands last, so it is never seen."""
        inside = lengths_mask(lengths, hidden_states.shape[1])[..., None]
        x, places = self.stretch(torch.where(inside, hidden_states, 0), lengths)
        return self.read(x, None), places

    def units(self, hidden_states: Tensor, lengths: Tensor) -> list[list[int]]:
        """Likeliest id of each place, collapsed."""
        logits, places = self.logits(hidden_states, lengths)
        rows = zip(logits.argmax(dim=-1).tolist(), places.tolist(), strict=True)
        return [ctc_collapse(row[:size], self.blank) for row, size in rows]

    def start(self, batch: int = 1) -> list[KVCache]:
        return [KVCache() for _ in self.blocks]

    @torch.inference_mode()
    def step(self, hidden_states: Tensor, state: list[KVCache]) -> Tensor:
        """Logits of the places of new hidden_states (batch, new tokens, llm_width); earlier ones stay."""
        new = torch.full((len(hidden_states),), hidden_states.shape[1], device=hidden_states.device)
        return self.read(self.stretch(hidden_states, new)[0], state)

    def stretch(self, hidden_states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Project, then repeat: the same as the other way round, at a fraction of the work."""
        return upsample(self.projection(hidden_states.to(self.projection.weight.dtype)), lengths, self.ratio)

    def read(self, x: Tensor, caches: list[KVCache] | None) -> Tensor:
        """Logits of places (batch, places, width) that follow what is in the caches (None: they are all)."""
        places, past = x.shape[1], len(caches[0]) if caches else 0
        if past == 0:
            x = torch.cat([self.begin.expand(len(x), 1, -1), x], dim=1)
        turn = rotation(past + torch.arange(x.shape[1], device=x.device), self.head_width)
        mask = causal_mask(x.shape[1], past + x.shape[1]).to(x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, turn, mask, caches[index] if caches else None)
        return self.output(x[:, x.shape[1] - places :])  # no norm in between, as released

    def require_feasible(self, places: Tensor, targets: Tensor, target_lengths: Tensor) -> None:
        """Raise InputError for the first row that CTC cannot write: its loss would be infinite."""
        needed = places_needed(targets, target_lengths)
        if (needed > places).any():
            row = int((needed > places).nonzero()[0])
            raise InputError(
                f"item {row} has {int(places[row])} places for units that need {int(needed[row])}, "
                f"expected at least as many: raise ratio (now {self.ratio}) or merge repeated units."
            )
