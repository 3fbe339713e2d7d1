"""A conversation on a simulated clock: a microphone, a player and a session, without waiting for real time.

Input time goes on in chunks; what the session computes in between takes as long as it takes, or no time at all. So
one run tells what a listener would have heard and when, faster than real time where the machine is. Used by:
conversation.py, notebook 10.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .audio import (
    CHUNK_MS,
    CHUNK_SAMPLES,
    SAMPLE_RATE_HZ,
    SPEECH_SAMPLE_RATE_HZ,
    pad_to_chunks,
    resample,
)
from .dialogue import Event, Session
from .duplex import DialogueState

CHUNK_SECONDS = CHUNK_MS / 1000


class Player:
    """Plays what it is given at 24 kHz from the moment it is given, and keeps all that came out.

    starts            turn -> when its answer was first heard, in seconds
    stops             (turn, seconds) of every flush
    underrun_seconds  silence within answers, because the next piece was not there
    """

    def __init__(self) -> None:
        self.queue: deque[Tensor] = deque()
        self.out: list[Tensor] = []
        self.samples = 0  # that came out, silence included
        self.turn = self.played = 0
        self.complete = True
        self.underrun_seconds = 0.0
        self.starts: dict[int, float] = {}
        self.stops: list[tuple[int, float]] = []

    @property
    def sounding(self) -> bool:
        """Whether an answer is heard or goes on later."""
        return bool(self.queue) or not self.complete

    def until(self, seconds: float) -> None:
        """Let it play until this time."""
        missing = round(seconds * SPEECH_SAMPLE_RATE_HZ) - self.samples
        while missing > 0 and self.queue:
            piece = self.queue.popleft()
            now, rest = piece[:missing], piece[missing:]
            if len(rest):
                self.queue.appendleft(rest)
            self.put(now)
            self.played += len(now)
            missing -= len(now)
        if missing > 0:
            self.put(torch.zeros(missing))
            if self.played and not self.complete:
                self.underrun_seconds += missing / SPEECH_SAMPLE_RATE_HZ

    def put(self, sound: Tensor) -> None:
        self.out.append(sound)
        self.samples += len(sound)

    def handle(self, event: Event, seconds: float) -> None:
        """An event of the session at this time."""
        self.until(seconds)
        if event.kind == "audio":
            if event.turn != self.turn:
                self.turn, self.played, self.complete = event.turn, 0, False
            self.starts.setdefault(event.turn, seconds)
            self.queue.append(event.data)
        elif event.kind == "answered":
            self.complete = True
        elif event.kind == "flush":
            self.queue.clear()
            self.stops.append((event.turn, seconds))
            self.turn, self.played, self.complete = 0, 0, True

    def heard(self, samples: int) -> Tensor:
        """The last `samples` (24 kHz) that came out."""
        last, count = [], 0
        for piece in reversed(self.out):
            last.insert(0, piece)
            count += len(piece)
            if count >= samples:
                break
        sound = torch.cat([torch.zeros(max(0, samples - count)), *last])
        return sound[-samples:]

    @property
    def track(self) -> Tensor:
        """All that came out (samples,) at 24 kHz."""
        return torch.cat([torch.zeros(0), *self.out])


@dataclass
class Load:
    """Computing time spent over stretches of simulated time, in seconds."""

    spent: float = 0.0
    passed: float = 0.0

    @property
    def real_time_factor(self) -> float:
        return self.spent / max(self.passed, 1e-9)


class Simulation:
    """Feeds a session chunk by chunk and lets it work in between.

    pace      seconds of simulated time that a second of computing takes: 1 as on this machine, 0 no time at all
    echo_db   level at which the microphone hears the player, dB; None: not at all
    log       (seconds, event) of everything that happened
    """

    def __init__(self, session: Session, pace: float = 1.0, echo_db: float | None = None) -> None:
        self.session, self.pace, self.player = session, pace, Player()
        self.echo = 0.0 if echo_db is None else 10 ** (echo_db / 20)
        self.seconds = 0.0  # simulated time
        self.chunks = 0
        self.log: list[tuple[float, Event]] = []
        self.microphone: list[Tensor] = []
        self.listening, self.speaking = (
            Load(),
            Load(),
        )  # while a turn is open; while an answer is made or played

    @property
    def input_seconds(self) -> float:
        return self.chunks * CHUNK_SECONDS

    def hear(self, waveform: Tensor, stop: Callable[[], bool] = lambda: False) -> None:
        """Let the microphone hear a waveform (samples,) at 16 kHz, chunk by chunk, unless `stop` says so earlier."""
        for chunk in pad_to_chunks(waveform).split(CHUNK_SAMPLES):
            if stop():
                return
            self.chunk(chunk)

    def wait(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Silence."""
        self.hear(torch.zeros(round(seconds * SAMPLE_RATE_HZ)), stop)

    def chunk(self, samples: Tensor) -> None:
        """The next 160 ms: first what can be computed until they have been recorded, then the chunk itself."""
        session = self.session
        busy = self.speaking if session.answer is not None else self.listening
        hearing, turns = session.turn is not None, session.turns
        arrival, spent = (self.chunks + 1) * CHUNK_SECONDS, 0.0
        while self.seconds < arrival and session.busy:
            spent += self.work(session.advance)
        self.seconds = max(self.seconds, arrival)
        self.pass_time()
        if self.echo:
            played = self.player.heard(CHUNK_SAMPLES * SPEECH_SAMPLE_RATE_HZ // SAMPLE_RATE_HZ)
            samples = samples + self.echo * resample(played, SPEECH_SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)
        self.microphone.append(samples)
        self.chunks += 1
        spent += self.work(lambda: session.feed(samples))
        if hearing or session.turns > turns or busy is self.speaking:
            busy.spent, busy.passed = busy.spent + spent, busy.passed + CHUNK_SECONDS

    def work(self, act: Callable[[], list[Event]]) -> float:
        """Do something and let the time pass that it took. Returns the seconds."""
        begin = time.perf_counter()
        events = act()
        spent = time.perf_counter() - begin
        self.seconds += self.pace * spent
        for event in events:
            self.log.append((self.seconds, event))
            self.player.handle(event, self.seconds)
        self.pass_time()
        return spent

    def pass_time(self) -> None:
        self.player.until(self.seconds)
        self.session.played(self.player.played, self.player.turn)

    def take_turn(self) -> None:
        """Have the open turn answered, whatever the state head says; if there is none, nothing happens."""
        self.work(lambda: self.session.close(DialogueState.TAKE_TURN, "forced"))

    def events(self, *kinds: str) -> list[tuple[float, Event]]:
        return [(seconds, event) for seconds, event in self.log if event.kind in kinds]

    @property
    def heard_by_session(self) -> Tensor:
        """All that the microphone heard (samples,) at 16 kHz."""
        return torch.cat([torch.zeros(0), *self.microphone])
