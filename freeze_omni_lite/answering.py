"""One answer in the making, in small units of work: LLM token, text segment, speech tokens, codec chunk.

Paper: "Streaming Speech Decoder" and the latency table T4. Whoever asks for the next unit gets the one whose sound is
needed first, so the first sound comes early and later ones in time. Nothing here knows about listening (dialogue.py).
"""

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .audio import HOP_SAMPLES, SPEECH_SAMPLE_RATE_HZ, SPEECH_TOKENS_PER_SECOND
from .frozen_llm import LLMCache
from .system import System
from .text import Segmenter, clean_for_speech

CODEC_CHUNK_TOKENS = (10, 40)  # shortest and longest piece that the codec decodes at once
UNIT_TOKENS = 5  # speech tokens drawn in one unit of work
STOCK_SECONDS = 0.4  # sound in stock below which speaking goes before writing
CONTEXT_TOKENS = 8  # tokens decoded again for the sake of the next one: spaces and halves of characters
EXPECTED_SAMPLES = SPEECH_SAMPLE_RATE_HZ // 15  # of one character, while a segment's end is not known


class Stopwatch:
    """Wall-clock marks of one turn, by name; the first mark of a name stands."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.perf_counter())

    def between_ms(self, start: str, end: str) -> float | None:
        """Milliseconds from one mark to another, None if either was not reached."""
        if start not in self.marks or end not in self.marks:
            return None
        return round(1000 * (self.marks[end] - self.marks[start]), 1)


# ---- from tokens to segments -----------------------------------------------------------------------------------------


@dataclass
class Segment:
    """A stretch of text to be spoken at once, the LLM states (width,) of its tokens, its characters of the answer."""

    text: str
    states: list[Tensor]
    begin: int = 0
    end: int = 0


class Script:
    """The text of an answer as its tokens come: new text at once, a Segment when one is ready.

    A token costs the same wherever it stands: only the last few tokens are decoded again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.segmenter = tokenizer, Segmenter()
        self.ids: list[int] = []
        self.ends: list[int] = []  # characters of the answer after each token
        self.pieces: list[str] = []
        self.shown = 0  # tokens whose text is out
        self.states: list[Tensor] = []
        self.cut = 0  # characters that are in a segment

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, token: int, state: Tensor) -> tuple[str, list[Segment]]:
        """A token and the state that predicted it -> the text that is now certain, the segments that are complete."""
        self.ids.append(token)
        self.states.append(state)
        delta = self.new_text()
        self.pieces.append(delta)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(delta))
        return delta, self.segments(self.segmenter.feed(delta))

    def finish(self) -> list[Segment]:
        """The rest, as segments."""
        return self.segments(self.segmenter.finish())

    def new_text(self) -> str:
        """What the tokens not yet shown add; nothing while the last one is half of a character."""
        first = max(0, self.shown - CONTEXT_TOKENS)
        before, after = (
            self.tokenizer.decode(self.ids[first:last], skip_special_tokens=True)
            for last in (self.shown, len(self.ids))
        )
        if after.endswith("\ufffd"):
            return ""
        self.shown = len(self.ids)
        return after[len(before) :]

    def segments(self, texts: list[str]) -> list[Segment]:
        """Segments of these texts; the tokens since the last one go with the first of them."""
        found = []
        for text in texts:
            begin, self.cut = self.cut, self.cut + len(text)
            found.append(Segment(text, self.states, begin, self.cut))
            self.states = []
        if found:  # the segmenter strips blanks, so its rest tells where the last segment ended
            found[-1].end = self.cut = self.ends[-1] - len(self.segmenter.buffer)
        return found


def spoken_pieces(system: System, generated: Iterator[tuple[int, Tensor]]) -> Iterator[str | Segment]:
    """Tokens and the states that predicted them -> new text (str) as it appears, and a Segment when one is ready."""
    script = Script(system.llm.tokenizer)
    for token, state in generated:
        delta, segments = script.add(token, state)
        yield from [delta] if delta else []
        yield from segments
    yield from script.finish()


# ---- from a segment to sound -----------------------------------------------------------------------------------------


class SegmentSpeech:
    """One segment being spoken: speech tokens are drawn a few at a time and become sound chunk by chunk.

    The text is spoken from its own token embeddings; the states of the tokens that the LLM wrote fill the prefix.
    """

    def __init__(self, system: System, segment: Segment, generator: torch.Generator) -> None:
        self.system, self.segment = system, segment
        self.pending: list[int] = []  # drawn, not yet decoded
        self.samples = 0  # given out so far
        self.ended = self.done = False
        ids = system.llm.tokenizer.encode(clean_for_speech(segment.text), add_special_tokens=False)
        prefix = system.prefix_decoder(torch.stack(segment.states)[None]) if segment.states else None
        preset = system.stage("decoder_nar_ar").preset
        self.codes = system.speech_decoder.generate(
            system.llm.embed([ids]),
            prefix,
            top_k=preset.top_k,
            generator=generator,
            max_speech_tokens=preset.max_speech_tokens,
            repetition_window=preset.repetition_window,
            repetition_penalty=preset.repetition_penalty,
            characters=system.speller(ids)[None].to(system.device),
        )
        self.stream = system.codec.start()

    def advance(self, chunk_tokens: int, stopwatch: Stopwatch) -> Tensor:
        """One unit of work: a few speech tokens, or the sound (samples,) of a chunk; empty if none is ready yet."""
        if not self.ended and len(self.pending) < chunk_tokens:
            self.draw(min(UNIT_TOKENS, chunk_tokens - len(self.pending)), stopwatch)
            return torch.zeros(0)
        codec, pieces = self.system.codec, []
        if self.pending:
            codes = torch.tensor([self.pending], device=self.system.device)
            pieces.append(codec.step(codes, self.stream)[0])
            self.pending = []
        if self.ended:
            pieces.append(codec.finish(self.stream)[0])
            self.done = True
        audio = torch.cat(pieces).cpu()
        self.samples += len(audio)
        return audio

    def draw(self, count: int, stopwatch: Stopwatch) -> None:
        for _ in range(count):
            code = next(self.codes, None)
            if code is None:
                self.ended = True
                return
            stopwatch.mark("first_token")
            self.pending.append(code)


def speak_segment(system: System, segment: Segment, generator: torch.Generator) -> Iterator[Tensor]:
    """One segment -> pieces of 24 kHz audio (samples,), for those who need not be quick."""
    speech, stopwatch = SegmentSpeech(system, segment, generator), Stopwatch()
    while not speech.done:
        audio = speech.advance(CODEC_CHUNK_TOKENS[-1], stopwatch)
        if len(audio):
            yield audio


def chunk_tokens(stock_samples: int) -> int:
    """Speech tokens of the next codec chunk: as much sound as is in stock, so that a chunk never comes too late.

    >>> chunk_tokens(0), chunk_tokens(24_000 // 2), chunk_tokens(10 * 24_000)
    (10, 20, 40)
    """
    shortest, longest = CODEC_CHUNK_TOKENS
    return max(shortest, min(longest, stock_samples * SPEECH_TOKENS_PER_SECOND // SPEECH_SAMPLE_RATE_HZ))


# ---- the whole answer ------------------------------------------------------------------------------------------------


@dataclass
class Placed:
    """Where a segment stands in the answer's sound; `end` is None while it is being spoken."""

    segment: Segment
    begin: int
    end: int | None = None


class Answer:
    """An answer between the decision and the last sample played.

    turn      number of the user turn that it answers
    opening   vectors (1, positions, width) to be read first: what of the turn is not yet in the cache, and the
              opening of the answer
    base      length of the cache before them
    played    samples that the player has played, at 24 kHz; set from outside
    """

    def __init__(
        self,
        system: System,
        cache: LLMCache,
        turn: int,
        opening: Tensor,
        generator: torch.Generator,
        stopwatch: Stopwatch,
        max_tokens: int,
    ) -> None:
        self.system, self.cache, self.turn, self.opening = system, cache, turn, opening
        self.base, self.max_tokens = cache.length, max_tokens
        self.generator, self.stopwatch = generator, stopwatch
        self.script = Script(system.llm.tokenizer)
        self.hidden: Tensor | None = None  # the LLM's last state of the opening (1, 1, width)
        self.tokens = self.write_tokens()
        self.written = self.done = False
        self.queue: deque[Segment] = deque()
        self.speech: SegmentSpeech | None = None
        self.spoken: list[Placed] = []
        self.emitted = self.played = 0

    @property
    def stock(self) -> int:
        """Samples that the player has and has not played yet."""
        return self.emitted - self.played

    @property
    def over(self) -> bool:
        """Whether everything is made and has been played."""
        return self.done and self.stock <= 0

    @property
    def begin(self) -> int:
        """Position of the first token of the answer in the cache."""
        return self.base + self.opening.shape[1]

    def advance(self) -> list[tuple[str, Any]]:
        """The unit of work whose sound is needed first -> what came of it: text, segment, audio, answered."""
        if self.speech is None and self.queue:
            self.speak_next()
            return []
        ahead = self.written or self.queue or self.stock < STOCK_SECONDS * SPEECH_SAMPLE_RATE_HZ
        if self.speech is not None and ahead:
            found = self.speak()
        else:
            found = self.write()
        if self.written and self.speech is None and not self.queue:
            self.done = True
            found.append(("answered", self.script.text))
        return found

    def read_opening(self) -> None:
        """Have the LLM read the opening, unless it has."""
        if self.hidden is None:
            self.hidden = self.system.llm.prefill(self.opening, self.cache)[:, -1:]

    def write_tokens(self) -> Iterator[tuple[int, Tensor]]:
        """Tokens and their states; the opening is read when the first one is asked for."""
        self.read_opening()
        yield from self.system.llm.generate(self.hidden, self.cache, self.max_tokens)

    def write(self) -> list[tuple[str, Any]]:
        """One token of text, or the last segment."""
        token = next(self.tokens, None)
        if token is None:
            self.written = True
            delta, segments = "", self.script.finish()
        else:
            self.stopwatch.mark("first_text")
            delta, segments = self.script.add(*token)
        self.queue.extend(segments)
        texts = [("text", delta)] if delta else []
        return texts + [("segment", segment.text) for segment in segments]

    def speak_next(self) -> None:
        """Begin with the next segment: its text is read by the speech decoder."""
        self.spoken.append(Placed(self.queue.popleft(), self.emitted))
        self.speech = SegmentSpeech(self.system, self.spoken[-1].segment, self.generator)

    def speak(self) -> list[tuple[str, Any]]:
        """A few speech tokens, or a chunk of sound."""
        audio = self.speech.advance(chunk_tokens(self.stock), self.stopwatch)
        self.emitted += len(audio)
        if self.speech.done:
            self.spoken[-1].end, self.speech = self.emitted, None
        if not len(audio):
            return []
        self.stopwatch.mark("first_pcm")
        return [("audio", audio)]

    def heard(self) -> int:
        """How many of the answer's tokens have been heard: the last one whose text was played.

        Within a segment the text is taken to go on evenly with the sound. Segments without sound count with the
        one before; an answer that has been played to its end was heard in full.
        """
        if self.over:
            return len(self.script.ids)
        characters = 0.0
        for spoken in self.spoken:
            if self.played < spoken.begin or (self.played == spoken.begin and spoken.end != spoken.begin):
                break
            segment = spoken.segment
            expected = spoken.begin + (segment.end - segment.begin) * EXPECTED_SAMPLES
            end = max(expected, self.emitted + HOP_SAMPLES) if spoken.end is None else spoken.end
            part = min(1.0, (self.played - spoken.begin) / max(1, end - spoken.begin))
            characters = segment.begin + part * (segment.end - segment.begin)
        heard = bisect_right(self.script.ends, characters) if characters else 0
        return min(heard, max(0, self.cache.length - self.begin))
