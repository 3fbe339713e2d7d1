"""Sentences that the frozen LLM writes around given words: open vocabulary for speech to be transcribed.

Templates (sentences.py) repeat a few hundred words; a recogniser that has met nothing else spells the rest wrongly. The
words are those of the LLM's own vocabulary, in which common ones come early. Used by: samples.py.
"""

import json
import re
from pathlib import Path

from . import sentences
from .files import atomic_write_json
from .parts import cache_dir

VERSION = 1  # of the request and of what is kept
SYSTEM_PROMPT = "You write sentences."
REQUEST = "Write one short sentence using the word {}."
MOST_TOKENS, MOST_WORDS = 22, 16
BATCH = 64  # requests between two notes of what is done
VOCABULARY_RANKS = (1000, 16_000)  # before: fragments and function words; after: rare words
BROUGHT_ALONG = Path(__file__).resolve().parents[1] / "data_samples" / "written"
TEST_SHARE = 10  # one word in ten is kept for the test


def written_sentences(llm_name: str, count: int, split: str = "train", progress: bool = True) -> list[str]:
    """`count` different sentences of 4 to 16 words written by the LLM, greedily; fewer if it runs out of words.

    Each word is asked about once, in an order that no seed changes, and belongs to one split; what was written is kept
    in the cache folder, and the repository brings 5,155 of SmolLM2 along: they take twelve minutes on two cores.
    A long sentence is broken off, for it is only to be read aloud and written down.
    """
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', llm_name)}-{split}-{VERSION}.json"
    path, brought = cache_dir() / "written" / name, BROUGHT_ALONG / name
    known = next((file for file in (path, brought) if file.is_file()), None)
    kept = json.loads(known.read_text(encoding="utf-8")) if known else {"asked": 0, "sentences": []}
    if len(kept["sentences"]) >= count:
        return kept["sentences"][:count]
    from .frozen_llm import FrozenLLM
    from .text import ChatLayout
    from .turns import answer_questions

    llm = FrozenLLM.load(llm_name)
    layout, words = ChatLayout.from_tokenizer(llm.tokenizer, SYSTEM_PROMPT), split_words(llm.tokenizer, split)
    while len(kept["sentences"]) < count and kept["asked"] < len(words):
        asked = words[kept["asked"] : kept["asked"] + BATCH]
        requests = [REQUEST.format(word) for word in asked]
        answers = answer_questions(llm, layout, requests, MOST_TOKENS, batch=BATCH)
        new = dict.fromkeys(filter(None, map(speakable, answers)))
        kept["sentences"] += [text for text in new if text not in set(kept["sentences"])]
        kept["asked"] += len(asked)
        atomic_write_json(path, kept)
        if progress:
            print(f"the LLM wrote {len(kept['sentences'])} of {count} {split} sentences")
    return kept["sentences"][:count]


def split_words(tokenizer, split: str) -> list[str]:
    """The words that one split asks about, common and rare ones mixed."""
    words = vocabulary(tokenizer)
    sentences.stream(0, "train", "words to write with").shuffle(words)
    return [word for i, word in enumerate(words) if (i % TEST_SHARE == 0) == (split == "test")]


def vocabulary(tokenizer) -> list[str]:
    """Words of 4 to 10 small letters that are one token of the LLM, in the order of its vocabulary."""
    last = min(VOCABULARY_RANKS[1], len(tokenizer))
    pieces = (tokenizer.decode([token]) for token in range(min(VOCABULARY_RANKS[0], last // 2), last))
    return [piece[1:] for piece in pieces if re.fullmatch(r" [a-z]{4,10}", piece)]


def speakable(text: str) -> str:
    """What can be read aloud of an answer: its beginning in plain letters, 4 to 16 words; else nothing.

    >>> speakable("The old boat lay on the sand. It was blue."), speakable("In 1990 the boat sank.")
    ('The old boat lay on the sand.', '')
    """
    plain = re.match(r"[A-Z][A-Za-z' ,-]*[.!?]?", text.strip().strip('"'))
    found = plain.group().split() if plain else []
    if found and found[-1][-1:] not in ".!?":
        found = found[:-1]  # broken off, perhaps within a word
    if len(found) > MOST_WORDS:
        found = found[:MOST_WORDS]
    return " ".join(found).rstrip(",") if len(found) >= 4 else ""
