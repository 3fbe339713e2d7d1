"""Text on both sides of the LLM: CTC units and their search, the chat layout, text made speakable.

Paper: "Chunk-wise Streaming Speech Encoder" (CTC), "Design for duplex dialogue" (layout), "Streaming Speech
Decoder" (text segments). Drawn in notebooks 02, 04 and 06.
"""

import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import InputError
from .numerals import spell_numbers

BLANK = 0
ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"
ABBREVIATIONS = {
    "mr.": "mister",
    "mrs.": "missus",
    "ms.": "miss",
    "dr.": "doctor",
    "prof.": "professor",
    "st.": "saint",
    "jr.": "junior",
    "sr.": "senior",
    "vs.": "versus",
    "etc.": "et cetera",
    "approx.": "approximately",
    "dept.": "department",
    "est.": "estimated",
    "fig.": "figure",
    "gov.": "governor",
    "mt.": "mount",
    "sgt.": "sergeant",
    "e.g.": "for example",
    "i.e.": "that is",
    "a.m.": "a m",
    "p.m.": "p m",
    "u.s.": "U S",
    "u.k.": "U K",
}


# ---- normal form ----


def fold(character: str) -> str:
    """Latin letters without their accents ("é" -> "e"); every other character as it is."""
    plain = unicodedata.normalize("NFKD", character)
    if plain and plain[0].isascii() and plain[0].isalpha():
        return "".join(c for c in plain if not unicodedata.combining(c))
    return character


def normalize(text: str) -> str:
    """The form in which transcripts are trained and scored: lower case, letters, apostrophes, single spaces.

    >>> normalize("It's 3 o'clock, José!")
    "it's three o'clock jose"
    """
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
    text = "".join(map(fold, spell_numbers(text))).lower()
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LM" else " " for c in text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", "".join(kept))
    return " ".join(text.split())


# ---- CTC units ----


@dataclass(frozen=True)
class CTCUnits:
    """Which characters CTC writes. Unit ids count from 1; 0 is the blank.

    >>> CTCUnits().decode(CTCUnits().encode("hello"))
    'hello'
    """

    characters: str = ENGLISH

    def __len__(self) -> int:
        """Units without the blank."""
        return len(self.characters)

    @classmethod
    def from_texts(cls, texts: Iterable[str], max_units: int) -> "CTCUnits":
        """The `max_units` commonest characters of normalised texts, for alphabets other than English."""
        counts = Counter(character for text in texts for character in normalize(text))
        return cls("".join(sorted(character for character, _ in counts.most_common(max_units))))

    def encode(self, text: str) -> list[int]:
        """Unit ids of the normalised text; characters that are no unit are left out."""
        places = {character: place for place, character in enumerate(self.characters, start=1)}
        return [places[character] for character in normalize(text) if character in places]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of unit ids whose repeats and blanks are already removed."""
        return "".join(self.characters[unit - 1] for unit in ids if unit != BLANK)

    def to_json(self) -> str:
        return json.dumps({"characters": self.characters}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CTCUnits":
        return cls(**json.loads(text))


def collapse(ids: Sequence[int], blank: int = BLANK) -> list[int]:
    """CTC's reading of a path: repeats become one, then blanks go.

    >>> collapse([1, 1, 0, 1, 2, 2])
    [1, 1, 2]
    """
    return [unit for unit, before in zip(ids, [None, *ids], strict=False) if unit not in (before, blank)]


def prefix_beam_search(log_probs: Tensor, beam: int = 8) -> list[tuple[tuple[int, ...], float]]:
    """The likeliest readings of (frames, 1 + units), each with its log probability, best first.

    A reading is the sum over all paths that collapse to it, so this can beat greedy decoding, which follows
    one path. Each prefix keeps two sums: paths that end in a blank, and paths that end in the prefix's last
    unit. Only the `beam + 1` likeliest units of a frame are tried.
    """
    log_probs = log_probs.detach().cpu().double()
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    scores, units = log_probs.topk(min(beam + 1, log_probs.shape[1]))
    for blank, *frame in zip(log_probs[:, BLANK].tolist(), scores.tolist(), units.tolist(), strict=True):
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, sums in beams.items():
            grown[prefix][0] = log_add(grown[prefix][0], log_add(*sums) + blank)
            for score, unit in zip(*frame, strict=True):
                if unit != BLANK:
                    extend(grown, prefix, sums, unit, score)
        ranked = sorted(grown.items(), key=lambda item: log_add(*item[1]), reverse=True)
        beams = {prefix: (in_blank, in_unit) for prefix, (in_blank, in_unit) in ranked[:beam]}
    found = [(prefix, log_add(*sums)) for prefix, sums in beams.items()]
    return [(prefix, score) for prefix, score in found if score > -math.inf]


def extend(grown: dict, prefix: tuple[int, ...], sums: tuple[float, float], unit: int, score: float) -> None:
    """Add the paths of `prefix` that go on with `unit`; repeated without a blank it is the same letter."""
    in_blank, in_unit = sums
    if prefix and prefix[-1] == unit:
        grown[prefix][1] = log_add(grown[prefix][1], in_unit + score)
        reach = in_blank
    else:
        reach = log_add(in_blank, in_unit)
    longer = grown[(*prefix, unit)]
    longer[1] = log_add(longer[1], reach + score)


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def viterbi_align(log_probs: Tensor, targets: Sequence[int]) -> list[int]:
    """The likeliest path through (frames, 1 + units) that reads as `targets`: a unit or blank a frame.

    States are blank, unit, blank, unit, ..., blank; a path stays, goes one on, or skips a blank between two
    different units. Raises ValueError if there are too few frames.
    """
    states = torch.full((2 * len(targets) + 1,), BLANK)
    states[1::2] = torch.tensor(list(targets), dtype=torch.long)
    may_skip = torch.zeros(len(states), dtype=torch.bool)
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    emissions = log_probs.detach().cpu().double()[:, states]
    score = torch.full((len(states),), -torch.inf, dtype=torch.float64)
    score[:2] = emissions[0, :2]
    moves = []
    for emission in emissions[1:]:
        steps = torch.stack(
            [score, shifted(score, 1), shifted(score, 2).where(may_skip, score.new_tensor(-torch.inf))]
        )
        best, move = steps.max(dim=0)
        score = best + emission
        moves.append(move)
    place = int(score[-2:].argmax()) + max(0, len(states) - 2)
    if torch.isinf(score[place]):
        raise ValueError(f"{len(targets)} units cannot be aligned to {len(log_probs)} frames: too few frames")
    path = [place]
    for move in reversed(moves):
        path.append(path[-1] - int(move[path[-1]]))
    return states[path[::-1]].tolist()


def shifted(score: Tensor, by: int) -> Tensor:
    """`score` moved `by` places to the right, minus infinity in front."""
    return torch.cat([score.new_full((by,), -torch.inf), score])[: len(score)]


# ---- chat layout ----


@dataclass(frozen=True)
class ChatLayout:
    """The token ids between the contents of a dialogue, cut so that a turn's end comes with the next turn.

    system        opening and system text, its end deferred: cached before the first turn
    user          end of whatever came before, opening of a user turn; speech vectors follow
    assistant     end of the user turn, opening of the answer
    end_of_turn   ids that end an answer; never fed back, because the next `user` begins with them

    Because no piece closes itself, an answer may be broken off anywhere and the context stays well-formed.
    """

    system: list[int]
    user: list[int]
    assistant: list[int]
    end_of_turn: list[int]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, system_prompt: str) -> "ChatLayout":
        """Cut the tokenizer's own chat template into pieces; no template is built in.

        Raises InputError if it has no template, no system role, or cannot be cut.
        """
        contents = ("SYSTEMSENTINEL", "FIRSTSENTINEL", "ANSWERSENTINEL", "SECONDSENTINEL")
        pieces = split_at(render(tokenizer, contents), contents)
        opening, before_first, _, before_second, assistant = pieces
        if before_first != before_second:
            raise InputError(
                "the chat template opens the first user turn differently from later ones, expected the same: "
                "choose an instruction-tuned model with a ChatML-like template."
            )
        user = token_ids(tokenizer, before_second)
        return cls(
            system=token_ids(tokenizer, opening + system_prompt),
            user=user,
            assistant=token_ids(tokenizer, assistant),
            end_of_turn=ending_ids(tokenizer, user),
        )


def render(tokenizer: Any, contents: Sequence[str]) -> str:
    """The chat template with a system text, a finished turn and a second question, open for its answer."""
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they like
        raise InputError(
            f"the tokenizer's chat template cannot be used ({error}), expected one with system, user and "
            "assistant roles: choose an instruction-tuned model."
        ) from None


def split_at(text: str, contents: Sequence[str]) -> list[str]:
    """The pieces of `text` around the contents. Raises InputError unless each occurs once and in order."""
    pattern = "(.*)" + "(.*)".join(map(re.escape, contents)) + "(.*)"
    match = re.fullmatch(pattern, text, flags=re.DOTALL)
    if not match or any(text.count(content) != 1 for content in contents):
        raise InputError(
            "the chat template does not show the system text and every turn once and in order: "
            "choose an instruction-tuned model whose template has a system role."
        )
    return list(match.groups())


def token_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def ending_ids(tokenizer: Any, user: list[int]) -> list[int]:
    """Ids that end an answer: the special token `user` begins with, and the tokenizer's end of sequence."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [token for token in user[:1] if token in special and token != tokenizer.unk_token_id]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise InputError(
            "the tokenizer has no end-of-turn token, expected a special one: choose a chat model."
        )
    return ids


# ---- speakable text ----

SENTENCE_ENDS = ".!?…"
WIDE_ENDS = "。！？"  # no space follows them
CLOSERS = "\"'”’)]*"


class Segmenter:
    """Cuts an answer that arrives in pieces into segments, spoken while the rest is still being written.

    The first segment may end at a comma or colon, to be heard early; later ones end with their sentence. What follows
    is awaited before a cut, one character or, after a number with a full stop, the next word's first letter: so how
    the text was cut into deltas does not matter. Segments that have nothing to say are left out.

    first_words   words that a first segment needs before a comma ends it
    max_words     longer segments are cut anyway
    """

    def __init__(self, first_words: int = 4, max_words: int = 30) -> None:
        self.first_words, self.max_words, self.max_characters = first_words, max_words, 10 * max_words
        self.buffer = ""
        self.spoken_any = False

    def feed(self, delta: str) -> list[str]:
        """Add text; returns the segments that are now complete."""
        found = []
        for character in delta:
            if self.ends_before(character):
                found += self.flush()
            self.buffer += character
        return found

    def finish(self) -> list[str]:
        """What is left (no or one segment); the segmenter can then be used anew."""
        found = self.flush()
        self.spoken_any = False
        return found

    def flush(self) -> list[str]:
        segment, self.buffer = self.buffer.strip(), ""
        if not clean_for_speech(segment):
            return []
        self.spoken_any = True
        return [segment]

    def ends_before(self, following: str) -> bool:
        """Whether the buffer is a segment, given the character after it."""
        if (
            following == "\n"
            or self.buffer[-1:] in tuple(WIDE_ENDS)
            or len(self.buffer) >= self.max_characters
        ):
            return True
        if not following.isspace():
            return self.buffer[-1:].isspace() and self.after_number(following)
        words = self.buffer.split()
        return self.at_sentence_end(words) or self.at_early_comma(words) or len(words) >= self.max_words

    def at_sentence_end(self, words: list[str]) -> bool:
        last = words[-1].rstrip(CLOSERS) if words else ""
        if not last or last[-1] not in SENTENCE_ENDS:
            return False
        return not (last[-1] == "." and (last[-2:-1].isdigit() or is_abbreviation(last)))

    def after_number(self, following: str) -> bool:
        """Whether a sentence ended with a number: "in 1990. The", but neither "1. Paris" nor "No. 5. 2"."""
        words = self.buffer.split()
        last = words[-1].rstrip(CLOSERS) if len(words) > 1 else ""
        return last[-1:] == "." and last[-2:-1].isdigit() and not (following.islower() or following.isdigit())

    def at_early_comma(self, words: list[str]) -> bool:
        return not self.spoken_any and len(words) >= self.first_words and words[-1][-1] in ",:;"


def is_abbreviation(word: str) -> bool:
    """Known ones, and initials such as "J." or "U.N."."""
    word = word.lstrip("\"'“‘([").lower()
    return word in ABBREVIATIONS or bool(re.fullmatch(r"(?:[^\W\d_]\.)+", word))


def clean_for_speech(text: str) -> str:
    """An answer as it is spoken: no markdown, brackets, line breaks; numbers and abbreviations in words.

    Sentence-final punctuation is forced, because the speech decoder ends where a sentence ends. Text with
    nothing to say becomes "".

    >>> clean_for_speech("**Dr. Smith** has 2 cats")
    'Doctor Smith has two cats.'
    """
    text = plain_lines(unicodedata.normalize("NFKC", strip_markdown(text)))
    text = re.sub(r"(?<=\w)(?:\s+[–—-]+\s+|\s*—\s*)(?=[^\W\d])", ", ", text)
    text = re.sub(r"\s*[(\[{]\s*|\s*[)\]}](?=\w)", ", ", text)
    text = re.sub(r"\s*[)\]}]\s*(?=[.,;:!?]|$)", "", text)
    text = re.sub(r"\s*[)\]}]", ",", text)
    text = spell_numbers(spell_abbreviations(text))
    text = "".join(c if speakable(c) else " " for c in text)
    text = re.sub(r"\.{2,}", ".", re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split())))
    text = re.sub(r"[,;:]+(?=[.,;:!?])", "", text).lstrip(".,;:!?- ")
    return ends_sentence(text) if any(c.isalnum() for c in text) else ""


def strip_markdown(text: str) -> str:
    """Words without code fences, links, emphasis, headings and list marks."""
    text = re.sub(r"```\w*|`", " ", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://\S+", " ", text)
    text = re.sub(r"^\s*(?:#{1,6}|>|[-*+•])\s+", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\d)\s*\*\s*(?=\d)", " × ", text)
    text = re.sub(r"\*+|~~|(?<!\w)_+|_+(?!\w)", "", text)
    return text.replace("’", "'").replace("‘", "'")


def plain_lines(text: str) -> str:
    """One line: a line break is heard as a comma unless punctuation already stands there."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line if line[-1] in ".,;:!?…" or line is lines[-1] else f"{line}," for line in lines)


def spell_abbreviations(text: str) -> str:
    """Known abbreviations in full; one that ends the text leaves its full stop."""
    for short, long in ABBREVIATIONS.items():
        pattern = rf"(?<!\w){re.escape(short)}(\s*$)?"
        text = re.sub(
            pattern,
            lambda m, long=long: like(m[0], long) + ("." if m[1] is not None else ""),
            text,
            flags=re.I,
        )
    return text


def like(short: str, long: str) -> str:
    """`long` with a capital if `short` has one."""
    return long[0].upper() + long[1:] if short[0].isupper() else long


def speakable(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM" or character in " .,;:!?'-…"


def ends_sentence(text: str) -> str:
    """`text` with . ! or ? at its end."""
    text = text.rstrip(" ,;:-'")
    return text if text[-1] in ".!?" + WIDE_ENDS else text.rstrip("…") + "."


# ---- tokens spelled out ----

SPELLING = ENGLISH + ".,!?;:-…"
SPELLING_IDS = len(SPELLING) + 2  # 0: no character; the last one: any other character


class Speller:
    """The characters of each LLM token, as the speech decoder may read them beside the token's vector."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, list[int]] = {}

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Token ids -> (tokens, characters of the longest) character ids with zeros behind; each token has one."""
        rows = [torch.tensor(self.spell(int(token))) for token in ids]
        return pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0, dtype=torch.long)

    def spell(self, token: int) -> list[int]:
        """The character ids of one token, small letters, its space included."""
        if token not in self.known:
            characters = "".join(map(fold, self.tokenizer.decode([token]))).lower() or "\ufffd"
            places = {character: place for place, character in enumerate(SPELLING, start=1)}
            self.known[token] = [places.get(character, SPELLING_IDS - 1) for character in characters]
        return self.known[token]
