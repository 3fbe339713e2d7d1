"""What the frozen LLM answers to questions by text, asked once and kept in the cache folder; its states meanwhile.

The speech decoder learns the LLM's own answers (paper: "Decoder training"). Thousands of them take minutes, and
nothing but the LLM, the system text and the length limit can change them, so they are kept under these.
Used by: speech_tokens.py.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .files import atomic_write_json
from .fingerprint import digest
from .frozen_llm import FrozenLLM, predicting_states
from .parts import cache_dir
from .ranks import rank, say
from .text import ChatLayout
from .turns import answer_questions

VERSION = 1  # of how they are asked and cut
SHARD_QUESTIONS = 192  # asked between two notes of what is done
BATCH = 48


def kept_answers(
    llm: FrozenLLM, system_prompt: str, questions: Sequence[str], answer_tokens: int
) -> list[str]:
    """The greedy answer to every question, cut after its last whole sentence; only new questions are asked.

    Answers are kept in shards, each file whole or not at all, so an interrupted run goes on where it stopped.
    """
    folder = folder_of(llm, system_prompt, answer_tokens)
    known = read(folder)
    new = [question for question in dict.fromkeys(questions) if question not in known]
    layout = ChatLayout.from_tokenizer(llm.tokenizer, system_prompt)
    for first in range(0, len(new), SHARD_QUESTIONS):
        asked = new[first : first + SHARD_QUESTIONS]
        found = dict(zip(asked, answer_questions(llm, layout, asked, answer_tokens, BATCH), strict=True))
        known |= found
        name = hashlib.sha256(f"{rank()} {asked}".encode()).hexdigest()[:16]
        atomic_write_json(folder / f"{name}.json", found)
        say(f"the LLM answered {first + len(asked)} of {len(new)} new questions")
    return [known[question] for question in questions]


def folder_of(llm: FrozenLLM, system_prompt: str, answer_tokens: int) -> Path:
    """Where the answers of this very LLM under this system text lie."""
    facts = [VERSION, digest(llm.fingerprint()), system_prompt, answer_tokens]
    return cache_dir() / "answers" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def read(folder: Path) -> dict[str, str]:
    """Question -> answer of all shards."""
    known: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        known |= json.loads(path.read_text(encoding="utf-8"))
    return known


@torch.no_grad()
def states_of(
    llm: FrozenLLM, rows: Sequence[tuple[list[int], list[int]]], batch: int = BATCH
) -> list[Tensor]:
    """For rows (token ids before, token ids written): the states (tokens, llm_width) that predict what was written.

    Batched by length: a causal model never looks at the padding on the right.
    """
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        ids = [torch.tensor([*rows[i][0], *rows[i][1]]) for i in part]
        hidden = llm.hidden(llm.embed(pad_sequence(ids, batch_first=True)))
        for i, states in zip(part, hidden, strict=True):
            found[i] = predicting_states(states, *map(len, rows[i])).float().cpu()
    return [found[i] for i in range(len(rows))]
