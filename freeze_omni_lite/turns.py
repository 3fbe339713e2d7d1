"""A dialogue as one row of LLM positions: text tokens, trained vectors and speech, in chat order, with its labels.

Paper: "Encoder training" stages 2 and 3. The end of a turn is deferred to the opening of the next one, so that a
row is valid wherever it stops (see text.ChatLayout). Used by notebooks 03, 04 and 08 and by dialogue.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .frozen_llm import IGNORE, FrozenLLM


@dataclass
class Row:
    """LLM positions under construction. labels[i] is the token to be predicted at position i, or IGNORE."""

    llm: FrozenLLM
    vectors: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    speech: list[tuple[int, int]] = field(default_factory=list)  # (first position, count) of every stretch of speech
    answers: list[tuple[int, int]] = field(default_factory=list)  # likewise for learned tokens

    def __len__(self) -> int:
        return len(self.labels)

    def tokens(self, ids: list[int]) -> "Row":
        """Text that is only read."""
        return self.trained(self.llm.embed(ids))

    def trained(self, vectors: Tensor) -> "Row":
        """Vectors (count, width) from an embedding of ours."""
        self.vectors.append(vectors)
        self.labels.extend([IGNORE] * len(vectors))
        return self

    def spoken(self, vectors: Tensor) -> "Row":
        """Adapter vectors (count, width)."""
        self.speech.append((len(self), len(vectors)))
        return self.trained(vectors)

    def answer(self, ids: list[int], end: int | None) -> "Row":
        """Tokens to be learned, each predicted by the position before it, then `end` (None: left open)."""
        self.answers.append((len(self), len(ids)))
        self.labels[-1:] = ids[:1] or ([] if end is None else [end])
        self.tokens(ids)
        following = ids[1:] + ([] if end is None else [end])
        first = len(self) - len(ids)
        self.labels[first : first + len(following)] = following
        return self


@dataclass
class Rows:
    """A batch of rows, padded on the right: vectors (batch, positions, width), labels (batch, positions)."""

    vectors: Tensor
    labels: Tensor
    rows: list[Row]


def join(rows: list[Row]) -> Rows:
    """Pad rows to one batch; padding is never learned from."""
    vectors = pad_sequence([torch.cat(row.vectors) for row in rows], batch_first=True)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=IGNORE)
    return Rows(vectors, labels.to(vectors.device), rows)


def speech_states(hidden: Tensor, rows: list[Row]) -> list[Tensor]:
    """The hidden states of every stretch of speech, in order, each (vectors, width)."""
    return [hidden[b, first : first + count] for b, row in enumerate(rows) for first, count in row.speech]
