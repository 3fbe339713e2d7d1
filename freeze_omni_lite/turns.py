"""A dialogue as one row of LLM positions: text tokens, trained vectors and speech, in chat order, with its labels.

Paper: "Encoder training" stages 2 and 3. The end of a turn is deferred to the opening of the next one, so that a
row is valid wherever it stops (see text.ChatLayout). Used by notebooks 03, 04 and 08 and by dialogue.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .frozen_llm import IGNORE, FrozenLLM
from .text import ChatLayout

TRANSCRIPT_TOKENS_PER_SECOND = 8


@dataclass
class Row:
    """LLM positions under construction. labels[i] is the token to be predicted at position i, or IGNORE."""

    llm: FrozenLLM
    vectors: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    speech: list[tuple[int, int]] = field(
        default_factory=list
    )  # (first position, count) of every stretch of speech
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
        first, targets = len(self), ids + ([] if end is None else [end])
        self.answers.append((first, len(ids)))
        self.tokens(ids)
        self.labels[first - 1 : first - 1 + len(targets)] = targets
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


def transcript_row(llm: FrozenLLM, layout: ChatLayout, task: Tensor, vectors: Tensor) -> Row:
    """Speech (vectors, width) that the LLM is asked to write down: everything before the transcript.

    task   the task embeddings (count, width)
    """
    return Row(llm).tokens(layout.system + layout.user).trained(task).spoken(vectors).tokens(layout.assistant)


def transcript_limit(seconds: float) -> int:
    """The most LLM tokens that so much speech may be written as; fast speech has about five a second."""
    return 16 + int(TRANSCRIPT_TOKENS_PER_SECOND * seconds)


@torch.inference_mode()
def written(row: Row, max_tokens: int) -> str:
    """What the LLM writes, greedily, after a row."""
    cache = row.llm.new_cache()
    hidden = row.llm.prefill(torch.cat(row.vectors)[None], cache)[:, -1:]
    return row.llm.tokenizer.decode(
        [token for token, _ in row.llm.generate(hidden, cache, max_tokens)]
    ).strip()


def speech_states(hidden: Tensor, rows: list[Row]) -> list[Tensor]:
    """The hidden states of every stretch of speech, in order, each (vectors, width)."""
    return [hidden[b, first : first + count] for b, row in enumerate(rows) for first, count in row.speech]


def text_turn(layout: ChatLayout, question: list[int]) -> list[int]:
    """Token ids of a conversation whose first turn is `question` as text, open for the answer."""
    return layout.system + layout.user + question + layout.assistant


def answer_questions(
    llm: FrozenLLM, layout: ChatLayout, questions: list[str], max_tokens: int, batch: int = 16
) -> list[str]:
    """The frozen LLM's own greedy answers to questions as text, batched, cut after the last whole sentence."""
    prompts = [
        text_turn(layout, llm.tokenizer.encode(question, add_special_tokens=False)) for question in questions
    ]
    return [whole_sentences(llm.tokenizer.decode(ids)) for ids in llm.answers(prompts, max_tokens, batch)]


Answer = tuple[list[int], int | None]  # token ids and the end token, as Row.answer takes them


def answer_dialogues(
    llm: FrozenLLM, layout: ChatLayout, dialogues: list[list[str]], max_tokens: int
) -> list[list[Answer]]:
    """The frozen LLM's own greedy answers to every question of every dialogue, all by text.

    A question is answered in the context of the questions and answers before it. An answer that runs into the limit
    is cut after its last whole sentence; if it has none, it is left open (no end token).
    """
    context, answers = [list(layout.system) for _ in dialogues], [[] for _ in dialogues]
    for turn in range(max(map(len, dialogues))):
        asked = [number for number, questions in enumerate(dialogues) if turn < len(questions)]
        for number in asked:
            question = llm.tokenizer.encode(dialogues[number][turn], add_special_tokens=False)
            context[number] += layout.user + question + layout.assistant
        written = llm.answers([context[number] for number in asked], max_tokens, batch=48)
        for number, ids in zip(asked, written, strict=True):
            answers[number].append(finished(llm, layout, ids, max_tokens))
            context[number] += answers[number][-1][0]
    return answers


def finished(llm: FrozenLLM, layout: ChatLayout, ids: list[int], max_tokens: int) -> Answer:
    """Generated ids with their end token, cut after a whole sentence if the limit was reached."""
    if len(ids) < max_tokens:
        return ids, layout.end_of_turn[0]
    text = whole_sentences(llm.tokenizer.decode(ids))
    if text[-1:] not in tuple(".!?"):
        return ids, None
    return llm.tokenizer.encode(text, add_special_tokens=False), layout.end_of_turn[0]


def whole_sentences(text: str) -> str:
    """Text up to its last sentence end, or all of it if there is none.

    >>> whole_sentences("Paris. It lies on the")
    'Paris.'
    """
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1].strip() if end >= 0 else text.strip()
