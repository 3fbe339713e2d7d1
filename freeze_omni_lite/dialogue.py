"""One conversation: audio in chunk by chunk, a decision for every chunk, and the answer out as it is made.

Paper: "Duplex" and the latency table T4. A Session holds nothing but caches and counters over the shared parts of a
System. This slice listens, then speaks; listening while speaking comes with the duplex engine.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .audio import CHUNK_MS, CHUNK_SAMPLES
from .duplex import DialogueState, decide
from .system import System
from .text import Segmenter, clean_for_speech, collapse
from .vad import LOOK_BACK_CHUNKS, SpeechGate

CODEC_CHUNK_TOKENS = (20, 40)  # the first piece of audio is short, later ones are longer


@dataclass
class Event:
    """Something that happened at `t_ms` of input time: state, opened, closed, text, audio, answered."""

    kind: str
    t_ms: int
    data: Any = None


class Stopwatch:
    """Wall-clock marks of one turn, by name; the first mark of a name stands."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.perf_counter())

    def passing(self, name: str, items: Iterator) -> Iterator:
        """The same items; the first one sets the mark."""
        for item in items:
            self.mark(name)
            yield item

    def between_ms(self, start: str, end: str) -> float | None:
        """Milliseconds from one mark to another, None if either was not reached."""
        if start not in self.marks or end not in self.marks:
            return None
        return round(1000 * (self.marks[end] - self.marks[start]), 1)


@dataclass
class OpenTurn:
    """A user turn that is being heard: the streams of the listening side, from the opening of the VAD on."""

    encoder: Any
    adapter: Any
    begin: int  # length of the LLM cache before this turn
    units: list[int] = field(default_factory=list)


class Session:
    """`feed` audio of any length; every whole chunk is decided at once.

    seed        of the speech decoder's sampling
    timeout_ms  silence after which an undecided turn is dropped; None: wait for a decision
    thresholds  probabilities above which a turn is answered and is dropped; None: the preset's. May be set at any time
    """

    def __init__(
        self,
        system: System,
        seed: int = 1,
        timeout_ms: int | None = 2000,
        thresholds: tuple[float, float] | None = None,
    ) -> None:
        self.system, self.generator = system, torch.Generator().manual_seed(seed)
        self.timeout_ms, self.thresholds = timeout_ms, thresholds
        self.gate = SpeechGate()
        self.mel_state = system.features.start()
        self.waiting = torch.zeros(0)
        self.look_back: deque[Tensor] = deque(maxlen=LOOK_BACK_CHUNKS)
        self.cache = system.llm.new_cache()
        system.llm.prefill(system.llm.embed([system.layout.system]), self.cache)
        self.turn: OpenTurn | None = None
        self.chunks = 0
        self.last_speech_ms = 0  # end of the last chunk in which the VAD heard speech
        self.decision_ms = 0.0  # from there to the newest decision, computing time included
        self.stopwatch = Stopwatch()

    @property
    def t_ms(self) -> int:
        """End of the last chunk, in input time."""
        return self.chunks * CHUNK_MS

    @property
    def timed_out(self) -> bool:
        return self.timeout_ms is not None and self.gate.silence_ms >= self.timeout_ms

    @torch.inference_mode()
    def feed(self, samples: Tensor) -> Iterator[Event]:
        """Audio (samples,) at 16 kHz -> events, in order; an answer is generated while they are read."""
        self.waiting = torch.cat([self.waiting, samples])
        while len(self.waiting) >= CHUNK_SAMPLES:
            chunk, self.waiting = self.waiting[:CHUNK_SAMPLES], self.waiting[CHUNK_SAMPLES:]
            yield from self._chunk(chunk)

    def _chunk(self, samples: Tensor) -> Iterator[Event]:
        arrived = time.perf_counter()
        speech = self.gate.step(samples)
        mels = self.system.features.step(samples[None].to(self.system.device), self.mel_state)
        self.chunks += 1
        self.last_speech_ms = self.t_ms if speech else self.last_speech_ms
        if self.turn is None and not speech:
            self.look_back.append(mels)
            yield self._state(None, None)
            return
        if self.turn is None:
            yield from self._open()
        state, p = self._listen(mels)
        self.decision_ms = self.t_ms - self.last_speech_ms + 1000 * (time.perf_counter() - arrived)
        yield self._state(state, p)
        if state is DialogueState.KEEP_LISTENING and self.timed_out:
            state = DialogueState.NO_RESPONSE
        if state is not DialogueState.KEEP_LISTENING:
            yield from self.close(state)

    def _state(self, state: DialogueState | None, p: Tensor | None) -> Event:
        values = [None] * 3 if p is None else [round(float(x), 4) for x in p]
        row = {"t_ms": self.t_ms, "state": None if state is None else int(state)}
        return Event("state", self.t_ms, row | dict(zip(("p0", "p1", "p2"), values, strict=True)))

    def _open(self) -> Iterator[Event]:
        """The VAD heard speech: open a user turn and replay what came just before; nobody asks for those states."""
        s = self.system
        self.turn = OpenTurn(s.encoder.start(), s.adapter.start(), self.cache.length)
        self.stopwatch = Stopwatch()
        opening = torch.cat([s.llm.embed(s.layout.user), s.prompt_embedding(1)[0]])
        s.llm.prefill(opening[None], self.cache)
        yield Event("opened", self.t_ms)
        for mels in self.look_back:
            self._listen(mels)
        self.look_back.clear()

    def _listen(self, mels: Tensor) -> tuple[DialogueState, Tensor]:
        """One chunk of features (1, 16, mels) through encoder, adapter and LLM to its state."""
        s, turn = self.system, self.turn
        frames = s.encoder.step(mels, turn.encoder)
        turn.units.extend(s.ctc_head(frames)[0].argmax(-1).tolist())
        hidden = s.llm.prefill(s.adapter.step(frames, turn.adapter), self.cache)
        p = s.state_head.probabilities(hidden[0, -1])
        preset = s.stage("duplex").preset
        thresholds = self.thresholds or (preset.take_turn_threshold, preset.no_response_threshold)
        return decide(p, *thresholds), p

    @property
    def transcript(self) -> str:
        """What the CTC head has read of the open turn."""
        return self.system.units.decode(collapse(self.turn.units)) if self.turn else ""

    def close(self, state: DialogueState) -> Iterator[Event]:
        """End the open turn: answer it, or drop it and what it put into the LLM's cache."""
        self.stopwatch.mark("decision")
        yield Event("closed", self.t_ms, {"state": int(state), "transcript": self.transcript})
        if state is DialogueState.TAKE_TURN:
            yield from self._answer()
        else:
            self.cache.crop(self.turn.begin)
        self.turn = None
        self.gate.reset()

    def _answer(self) -> Iterator[Event]:
        """Text, then speech segment by segment, as the LLM goes on writing."""
        s = self.system
        hidden = s.llm.prefill(s.llm.embed([s.layout.assistant]), self.cache)[:, -1:]
        limit = s.stage("encoder_prompt").preset.answer_tokens
        text = ""
        for piece in spoken_pieces(
            s, self.stopwatch.passing("first_text", s.llm.generate(hidden, self.cache, limit))
        ):
            if isinstance(piece, str):
                text += piece
                yield Event("text", self.t_ms, piece)
                continue
            for audio in speak_segment(s, piece, self.generator, self.stopwatch):
                yield Event("audio", self.t_ms, audio)
        yield Event("answered", self.t_ms, text)


@dataclass
class Segment:
    """A stretch of text to be spoken at once, and the LLM states (width,) of its tokens."""

    text: str
    states: list[Tensor]


def spoken_pieces(system: System, generated: Iterator[tuple[int, Tensor]]) -> Iterator[str | Segment]:
    """Tokens and the states that predicted them -> new text (str) as it appears, and a Segment when one is ready."""
    segmenter, ids, states, shown = Segmenter(), [], [], ""
    for token, state in generated:
        ids.append(token)
        states.append(state)
        text = system.llm.tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # half of a character: wait for the other half
            continue
        delta, shown = text[len(shown) :], text
        yield delta
        for segment in segmenter.feed(delta):
            yield Segment(segment, states)
            states = []
    for segment in segmenter.finish():
        yield Segment(segment, states)
        states = []


def speak_segment(
    system: System, segment: Segment, generator: torch.Generator, stopwatch: Stopwatch | None = None
) -> Iterator[Tensor]:
    """One segment -> pieces of 24 kHz audio (samples,), the first after CODEC_CHUNK_TOKENS[0] speech tokens.

    The text is spoken from its own token embeddings; the states of the tokens that the LLM wrote fill the prefix.
    """
    stopwatch = stopwatch or Stopwatch()
    ids = system.llm.tokenizer.encode(clean_for_speech(segment.text), add_special_tokens=False)
    prefix = system.prefix_decoder(torch.stack(segment.states)[None]) if segment.states else None
    preset = system.stage("decoder_nar_ar").preset
    codes = system.speech_decoder.generate(
        system.llm.embed([ids]),
        prefix,
        top_k=preset.top_k,
        generator=generator,
        max_speech_tokens=preset.max_speech_tokens,
        repetition_window=preset.repetition_window,
        repetition_penalty=preset.repetition_penalty,
    )
    stream = system.codec.start()
    for piece in batches(stopwatch.passing("first_token", codes), CODEC_CHUNK_TOKENS):
        audio = system.codec.step(torch.tensor([piece], device=system.device), stream)[0].cpu()
        stopwatch.mark("first_pcm")
        yield audio
    yield system.codec.finish(stream)[0].cpu()


def batches(codes: Iterator[int], sizes: tuple[int, ...]) -> Iterator[list[int]]:
    """Group a stream of codes: first sizes[0] of them, then sizes[1], …; the last size repeats."""
    codes, number = iter(codes), 0
    while piece := list(islice(codes, sizes[min(number, len(sizes) - 1)])):
        yield piece
        number += 1
