"""One conversation: audio in chunk by chunk, a decision for every chunk, and the answer out as it is made.

Paper: "Duplex" and the latency table T4. A Session holds nothing but caches and counters over the shared parts of a
System. `feed` only listens, `advance` does one small unit of the pending answer, so one thread can do both in turn
and listening goes on while the system speaks. Used by: verbs.py, conversation.py, notebooks 08 and 10.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .answering import Answer, Stopwatch
from .audio import (
    CHUNK_MS,
    CHUNK_SAMPLES,
    LLM_VECTORS_PER_CHUNK,
    SAMPLE_RATE_HZ,
    SPEECH_SAMPLE_RATE_HZ,
    exact,
)
from .context import Context, Exchange
from .duplex import DialogueState, decide
from .errors import InputError, StageMismatch
from .files import atomic_write
from .frozen_llm import LLMCache
from .system import System
from .text import collapse
from .vad import LOOK_BACK_CHUNKS, SpeechGate

CONTEXT_POSITIONS = 4096  # of the LLM; about half an hour of talk
REOPEN_CHUNKS = 5  # 800 ms: who goes on within them, before any answer is heard, had not finished
IDLE_SECONDS = 0.002  # how long `run` waits when there is neither sound nor work
CHUNK_SPOKEN_SAMPLES = exact(CHUNK_SAMPLES * SPEECH_SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)  # 3840


@dataclass
class Event:
    """Something that happened at `t_ms` of input time in user turn `turn` (or in the answer to it).

    state        every chunk: {t_ms, state, p0, p1, p2}, None where nobody is asked
    opened       the gate heard speech: a user turn begins
    closed       it ended: {state, transcript, reason}; reason: decision, timeout, full, forced
    ignored      it is not answered, and forgotten; the reason
    reopened     it had not ended: the user goes on, the answer is cancelled
    text         new text of the answer
    segment      text that will be spoken at once
    audio        24 kHz sound (samples,) of the answer
    answered     all of the answer is made (not yet played); its text
    interrupted  a new turn is taken: {text, tokens} of the answer that were heard
    flush        the player must drop what it has not played of this answer
    """

    kind: str
    t_ms: int
    data: Any = None
    turn: int = 0


@dataclass
class OpenTurn:
    """A user turn that is being heard: the streams of the listening side, from the opening of the VAD on.

    cache   what the LLM reads the turn into: the conversation itself, or a fork of it while an answer is played
    begin   length of that cache before this turn
    mels, vectors   what was heard: features of every chunk, and what the adapter made of them
    """

    number: int
    encoder: Any
    adapter: Any
    cache: LLMCache
    begin: int
    units: list[int] = field(default_factory=list)
    mels: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)


class Session:
    """`feed` audio of any length, every whole chunk is decided at once; `advance` while `busy`; report `played`.

    seed        of the speech decoder's sampling
    timeout_ms  silence after which an undecided turn is dropped; None: wait for a decision
    thresholds  probabilities above which a turn is answered and is dropped; None: the preset's. May be set at any time
    context_positions   of the LLM; when most are used, the oldest turns are forgotten
    """

    def __init__(
        self,
        system: System,
        seed: int = 1,
        timeout_ms: int | None = 2000,
        thresholds: tuple[float, float] | None = None,
        context_positions: int = CONTEXT_POSITIONS,
    ) -> None:
        self.system, self.generator = system, torch.Generator().manual_seed(seed)
        self.timeout_ms, self.thresholds = timeout_ms, thresholds
        self.answer_tokens = system.stage("encoder_prompt").preset.answer_tokens  # of an answer, at most
        self.gate = SpeechGate()
        self.mel_state = system.features.start()
        self.waiting = torch.zeros(0)
        self.look_back: deque[Tensor] = deque(maxlen=LOOK_BACK_CHUNKS)
        self.context = Context(system, context_positions)
        self.turn: OpenTurn | None = None  # being heard
        self.answer: Answer | None = None  # being made or played
        self.answered: OpenTurn | None = None  # the turn of that answer
        self.chunks = self.turns = self.taken = 0  # so far; `taken`: chunks when a turn was last taken
        self.reported = False  # whether a player tells what it has played
        self.last_speech_ms = 0  # end of the last chunk in which the VAD heard speech
        self.decision_ms = 0.0  # from there to the newest decision, computing time included
        self.stopwatch = Stopwatch()

    @property
    def t_ms(self) -> int:
        """End of the last chunk, in input time."""
        return self.chunks * CHUNK_MS

    @property
    def cache(self) -> LLMCache:
        """What the LLM remembers of the conversation."""
        return self.context.cache

    @property
    def timed_out(self) -> bool:
        return self.timeout_ms is not None and self.gate.silence_ms >= self.timeout_ms

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to do."""
        if self.answer is not None:
            return not self.answer.done
        return self.turn is None and (self.context.crowded or self.context.rebuilding is not None)

    @property
    def transcript(self) -> str:
        """What the CTC head has read of the open turn."""
        return self.system.units.decode(collapse(self.turn.units)) if self.turn else ""

    # ---- the four verbs ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def feed(self, samples: Tensor) -> list[Event]:
        """Listen to audio (samples,) at 16 kHz. Never makes any of an answer."""
        self.waiting = torch.cat([self.waiting, samples])
        events: list[Event] = []
        while len(self.waiting) >= CHUNK_SAMPLES:
            chunk, self.waiting = self.waiting[:CHUNK_SAMPLES], self.waiting[CHUNK_SAMPLES:]
            events.extend(self._chunk(chunk))
        return events

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """One small unit of pending work: an LLM token, some speech tokens, a codec chunk, a block of old context."""
        if not self.busy:
            return []
        if self.answer is None:
            self.context.advance()
            return []
        turn = self.answer.turn
        events = [Event(kind, self.t_ms, data, turn) for kind, data in self.answer.advance()]
        self._retire()
        return events

    @torch.inference_mode()
    def played(self, samples: int, turn: int | None = None) -> None:
        """The player has played `samples` (24 kHz) of the current answer, counted from its beginning.

        A session without any report takes the sound to be played as input time goes by.

        turn   of the answer that is meant: a late report about an earlier one does no harm then
        """
        if self.answer is None or (turn is not None and turn != self.answer.turn):
            return
        self.reported = True
        self.answer.played = min(max(samples, self.answer.played), self.answer.emitted)
        self._retire()

    @torch.inference_mode()
    def close(self, state: DialogueState, reason: str = "decision") -> list[Event]:
        """End the open turn, if there is one: answer it, or drop it and what it put into the LLM's cache."""
        return list(self._close(state, reason)) if self.turn is not None else []

    # ---- listening ---------------------------------------------------------------------------------------------------

    def _chunk(self, samples: Tensor) -> Iterator[Event]:
        arrived = time.perf_counter()
        speech = self.gate.step(samples)
        mels = self.system.features.step(samples[None].to(self.system.device), self.mel_state)
        self.chunks += 1
        self.last_speech_ms = self.t_ms if speech else self.last_speech_ms
        self._time_goes_by()
        if self.turn is None and not speech:
            self.look_back.append(mels)
            yield self._state(None, None)
            return
        if self.turn is None:
            yield from self._reopen() if self.premature else self._open()
        state, p = self._listen(mels)
        self.decision_ms = self.t_ms - self.last_speech_ms + 1000 * (time.perf_counter() - arrived)
        yield self._state(state, p)
        reason = "decision"
        if state is DialogueState.KEEP_LISTENING and (self.timed_out or self.full):
            state, reason = DialogueState.NO_RESPONSE, "timeout" if self.timed_out else "full"
        if state is not DialogueState.KEEP_LISTENING:
            yield from self._close(state, reason)

    def _state(self, state: DialogueState | None, p: Tensor | None) -> Event:
        values = [None] * 3 if p is None else [round(float(x), 4) for x in p]
        row = {"t_ms": self.t_ms, "state": None if state is None else int(state)}
        row |= dict(zip(("p0", "p1", "p2"), values, strict=True))
        return Event("state", self.t_ms, row, self.turn.number if self.turn else 0)

    def _time_goes_by(self) -> None:
        """Without reports, a chunk of input is as long as what was played meanwhile."""
        if self.answer is not None and not self.reported:
            self.answer.played = min(self.answer.emitted, self.answer.played + CHUNK_SPOKEN_SAMPLES)
        self._retire()

    def _open(self) -> Iterator[Event]:
        """The VAD heard speech: open a user turn and replay what came just before; nobody asks for those states.

        While an answer is made or played, the turn is tried on a fork: the conversation up to what is heard by now.
        """
        context = self.context
        if self.answer is None:
            context.make_room()
            cache = context.cache
        else:
            self.answer.read_opening()
            cache = context.cache.fork(self.answer.begin + self.answer.heard())
        self.turns += 1
        self._begin(self.turns, cache)
        yield Event("opened", self.t_ms, turn=self.turns)
        self._replay()

    def _begin(self, number: int, cache: LLMCache) -> None:
        s = self.system
        self.turn = OpenTurn(number, s.encoder.start(), s.adapter.start(), cache, cache.length)
        s.llm.prefill(self.context.opening[None], cache)

    def _replay(self) -> None:
        """Hear what came before the gate opened."""
        for mels in self.look_back:
            self._listen(mels)
        self.look_back.clear()

    def _listen(self, mels: Tensor) -> tuple[DialogueState, Tensor]:
        """One chunk of features (1, 16, mels) through encoder, adapter and LLM to its state."""
        s, turn = self.system, self.turn
        frames = s.encoder.step(mels, turn.encoder)
        turn.units.extend(s.ctc_head(frames)[0].argmax(-1).tolist())
        vectors = s.adapter.step(frames, turn.adapter)
        turn.mels.append(mels)
        turn.vectors.append(vectors[0])
        p = s.state_head.probabilities(s.llm.prefill(vectors, turn.cache)[0, -1])
        preset = s.stage("duplex").preset
        thresholds = self.thresholds or (preset.take_turn_threshold, preset.no_response_threshold)
        return decide(p, *thresholds), p

    @property
    def full(self) -> bool:
        """Whether the open turn leaves too little of the context for an answer."""
        return self.context.room(self.turn.cache) < LLM_VECTORS_PER_CHUNK + 2 * self.answer_tokens

    # ---- deciding ----------------------------------------------------------------------------------------------------

    def _close(self, state: DialogueState, reason: str) -> Iterator[Event]:
        if state is DialogueState.TAKE_TURN:
            self.stopwatch = Stopwatch()
            self.stopwatch.mark("decision")
        row = {"state": int(state), "transcript": self.transcript, "reason": reason}
        turn, self.turn = self.turn, None
        yield Event("closed", self.t_ms, row, turn.number)
        self.gate.reset()
        if state is DialogueState.TAKE_TURN:
            yield from self._take(turn)
            return
        if turn.cache is self.cache:  # a fork is simply forgotten
            self.cache.crop(turn.begin)
        yield Event("ignored", self.t_ms, reason, turn.number)

    def _take(self, turn: OpenTurn) -> Iterator[Event]:
        """Answer a turn. One that was heard on a fork comes to stand after what was heard of the answer before it."""
        if self.answer is not None:
            yield from self._interrupt()
        context, vectors = self.context, torch.cat(turn.vectors)
        opening = [context.answer_opening]
        if turn.cache is not context.cache:
            context.make_room()
            opening = [context.opening, vectors, *opening]
        context.exchanges.append(Exchange(vectors))
        self.answered, self.taken = turn, self.chunks
        self.answer = Answer(
            self.system,
            context.cache,
            turn.number,
            torch.cat(opening)[None],
            self.generator,
            self.stopwatch,
            self.answer_tokens,
        )

    def _interrupt(self) -> Iterator[Event]:
        """The answer stops here and stays in the context as far as it was heard."""
        answer, heard = self.answer, self.answer.heard()
        yield Event("flush", self.t_ms, turn=answer.turn)
        text = answer.script.text[: answer.script.ends[heard - 1]] if heard else ""
        yield Event("interrupted", self.t_ms, {"text": text, "tokens": heard}, answer.turn)
        self._end_answer(heard)

    def _end_answer(self, tokens: int) -> None:
        self.answer.read_opening()
        self.context.finish(self.answer.script.ids[:tokens], self.answer.begin)
        self.answer = self.answered = None

    def _retire(self) -> None:
        """An answer that was played to its end is part of the conversation."""
        if self.answer is not None and self.answer.over:
            self._end_answer(len(self.answer.script.ids))

    @property
    def premature(self) -> bool:
        """Whether the user goes on so soon, and before hearing anything, that the turn had not ended."""
        soon = self.chunks - self.taken <= REOPEN_CHUNKS
        return soon and self.answer is not None and self.answer.played == 0

    def _reopen(self) -> Iterator[Event]:
        """Take the decision back: the answer is cancelled, the same turn goes on."""
        answer, turn, context = self.answer, self.answered, self.context
        self.turn, self.answer, self.answered = turn, None, None
        if answer.emitted:
            yield Event("flush", self.t_ms, turn=turn.number)
        context.exchanges.pop()
        context.cache.crop(answer.base)
        if turn.cache is not context.cache:
            turn.cache, turn.begin = context.cache, context.cache.length
            context.read(torch.cat([context.opening, *turn.vectors]))
        yield Event("reopened", self.t_ms, turn=turn.number)
        self._replay()

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the session to one safetensors file, whole or not at all; what it is stands in its header as JSON.

        An answer in the making is saved as far as it was heard, an open turn with all its sound.
        """
        from safetensors.torch import save_file

        exchanges, turn = [(e.vectors, e.answer) for e in self.context.exchanges], self.turn
        if self.answer is not None:
            exchanges[-1] = (exchanges[-1][0], self.answer.script.ids[: self.answer.heard()])
        tensors = {
            "waiting": self.waiting,
            "carry": self.mel_state.carry,
            "generator": self.generator.get_state(),
        }
        tensors |= {f"gate.{name}": value for name, value in self.gate.remember().items()}
        tensors |= {f"exchange.{i}": vectors for i, (vectors, _) in enumerate(exchanges)}
        if self.look_back:
            tensors["look_back"] = torch.cat(list(self.look_back))
        if turn is not None:
            tensors["turn"] = torch.cat(turn.mels)
        about = {name: getattr(self, name) for name in SAVED}
        about |= {"answers": [answer for _, answer in exchanges], "number": turn.number if turn else 0}
        about |= {"llm": self.system.llm.name, "context_positions": self.context.limit}
        whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        return atomic_write(
            path, lambda partial: save_file(whole, partial, {"freeze_omni_session": json.dumps(about)})
        )

    @classmethod
    @torch.inference_mode()
    def load(cls, system: System, path: str | Path) -> "Session":
        """Go on with a saved session. Raises InputError for any other file, StageMismatch for another LLM."""
        about, tensors = read_session(Path(path))
        if about["llm"] != system.llm.name:
            raise StageMismatch(
                f"{path} was saved with the language model {about['llm']!r}, this system has {system.llm.name!r}: "
                "load it with the stages it was saved with."
            )
        session = cls(system, context_positions=about["context_positions"])
        for name in SAVED:
            setattr(session, name, about[name])
        session.thresholds = tuple(about["thresholds"]) if about["thresholds"] else None
        session.waiting, session.mel_state.carry = tensors["waiting"], tensors["carry"].to(system.device)
        session.generator.set_state(tensors["generator"])
        session.gate.restore({n[5:]: value for n, value in tensors.items() if n.startswith("gate.")})
        context = session.context
        for i, answer in enumerate(about["answers"]):
            context.exchanges.append(Exchange(tensors[f"exchange.{i}"].to(system.device), answer))
            context.read(context.vectors_of(context.exchanges[-1]))
        if "look_back" in tensors:
            session.look_back.extend(tensors["look_back"][:, None].to(system.device))
        if about["number"]:
            session._begin(about["number"], context.cache)
            for mels in tensors["turn"][:, None].to(system.device):
                session._listen(mels)
        return session


SAVED = ("chunks", "turns", "taken", "last_speech_ms", "decision_ms", "timeout_ms", "thresholds", "reported")


def read_session(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a saved session tells of itself, and its tensors. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["freeze_omni_session"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no saved session ({error}): give a file that Session.save has written."
        ) from None


def respond(session: Session, samples: Tensor) -> Iterator[Event]:
    """Feed audio (samples,) chunk by chunk and do all pending work after each, as if computing took no time."""
    for piece in samples.split(CHUNK_SAMPLES):
        yield from session.feed(piece)
        yield from finish(session)


def finish(session: Session) -> Iterator[Event]:
    """Do all pending work."""
    while session.busy:
        yield from session.advance()


def run(session: Session, source: Iterable[Tensor], sink: Callable[[Event], None]) -> None:
    """The loop of a live conversation, in one thread, until the source ends.

    source   gives what has arrived since the last time, 16 kHz (samples,), empty if nothing has; it must not wait
    sink     gets every event at once
    """
    for samples in source:
        events = session.feed(samples) if len(samples) else session.advance()
        for event in events:
            sink(event)
        if not len(samples) and not session.busy:
            time.sleep(IDLE_SECONDS)
    for event in finish(session):
        sink(event)
