"""What the LLM remembers of a conversation: its cache, and the turns in it from which the cache can be made again.

Paper: "Design for duplex dialogue" (layout of the turns). When the cache is nearly full, the oldest whole turns are
forgotten, the system text stays. Used by: dialogue.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .frozen_llm import LLMCache
from .system import System

CROWDED = 3 / 4  # of the limit: from here on turns are forgotten at the next quiet moment
KEPT = 1 / 2  # of the limit: so much is kept then
BLOCK_POSITIONS = 64  # read at once when the cache is made again


@dataclass
class Exchange:
    """One user turn as the LLM heard it, vectors (count, width), and the answer's tokens as the user heard them."""

    vectors: Tensor
    answer: list[int] = field(default_factory=list)


class Context:
    """The cache of one conversation: system text, then exchange after exchange.

    limit   positions of the cache, at most
    """

    def __init__(self, system: System, limit: int) -> None:
        self.system, self.limit = system, min(limit, system.llm.positions)
        self.exchanges: list[Exchange] = []
        self.cache = system.llm.new_cache()
        self.rebuilding: Iterator[None] | None = None
        system.llm.prefill(self.system_text, self.cache)

    @property
    def system_text(self) -> Tensor:
        return self.system.llm.embed([self.system.layout.system])

    @property
    def opening(self) -> Tensor:
        """What stands before the speech of every user turn: (positions, width)."""
        embed, layout = self.system.llm.embed, self.system.layout
        return torch.cat([embed(layout.user), self.system.prompt_embedding(1)[0]])

    @property
    def answer_opening(self) -> Tensor:
        """What stands before every answer: (positions, width)."""
        return self.system.llm.embed(self.system.layout.assistant)

    @property
    def crowded(self) -> bool:
        """Whether the oldest turns should be forgotten when nobody waits."""
        return self.cache.length > CROWDED * self.limit and bool(self.exchanges)

    def room(self, cache: LLMCache) -> int:
        """Positions left in a cache of this conversation for an answer, once it is opened."""
        return self.limit - cache.length - len(self.system.layout.assistant)

    def read(self, vectors: Tensor) -> None:
        """Append vectors (positions, width)."""
        self.system.llm.prefill(vectors[None], self.cache)

    def vectors_of(self, exchange: Exchange) -> Tensor:
        """An exchange as the LLM reads it: (positions, width)."""
        answer = self.system.llm.embed(exchange.answer)
        return torch.cat([self.opening, exchange.vectors, self.answer_opening, answer])

    def rebuild(self) -> Iterator[None]:
        """Forget the oldest turns and read the others anew, a block at a time; the old cache serves until the end."""
        kept, positions = [], len(self.system.layout.system)
        for exchange in reversed(self.exchanges):
            vectors = self.vectors_of(exchange)
            positions += len(vectors)
            if positions > KEPT * self.limit:
                break
            kept.insert(0, vectors)
        cache = self.system.llm.new_cache()
        for block in torch.cat([self.system_text[0], *kept]).split(BLOCK_POSITIONS):
            self.system.llm.prefill(block[None], cache)
            yield
        self.exchanges = self.exchanges[len(self.exchanges) - len(kept) :]
        self.cache = cache

    def advance(self) -> bool:
        """One block of a rebuild that is due; whether there was anything to do."""
        if self.rebuilding is None:
            if not self.crowded:
                return False
            self.rebuilding = self.rebuild()
        if next(self.rebuilding, self) is self:
            self.rebuilding = None
        return True

    def make_room(self) -> None:
        """All of a rebuild that is due, at once: somebody wants to speak."""
        while self.advance():
            pass

    def finish(self, answer: list[int], position: int) -> None:
        """The newest answer ends after these tokens, the first of which stands at `position`; the rest is cropped."""
        self.exchanges[-1].answer = answer
        self.cache.crop(position + len(answer))
