"""When a recorded scene is answered, and how often that is right: a live session's decisions, computed block by block.

Paper: "Design for duplex dialogue". A test compares `Rehearsal` with dialogue.Session. Used by: listening.py,
notebook 08.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .audio import CHUNK_MS, CHUNK_SAMPLES, LLM_VECTORS_PER_CHUNK, MEL_FRAMES_PER_CHUNK, pad_to_chunks
from .duplex import DialogueState, chunk_states, decide
from .hearing import Heard, Listener
from .system import System
from .vad import LOOK_BACK_CHUNKS

BLOCK_CHUNKS = 16  # heard by the LLM at once; what follows a decision is not computed


@dataclass(frozen=True)
class Decision:
    """How a turn ended, at the end of chunk `chunk`; KEEP_LISTENING if the recording ended first."""

    state: DialogueState
    chunk: int

    def delay_ms(self, last_voiced_seconds: float) -> float:
        """Milliseconds of input from the last voiced sample to the decision; negative: the speaker went on."""
        return CHUNK_MS * (self.chunk + 1) - 1000 * last_voiced_seconds


def first_decision(p: Tensor, heard: Heard, take_turn: float, no_response: float) -> Decision:
    """The first decision of a turn from the probabilities (chunks, 3) of all that was heard of it."""
    for chunk, row in enumerate(p, start=heard.first):
        state = decide(row, take_turn, no_response)
        if state and chunk >= heard.opened:
            return Decision(state, chunk)
    return Decision(DialogueState.KEEP_LISTENING, heard.first + len(p) - 1)


class Rehearsal:
    """What a session does with a recording up to its first answer, without giving it.

    timeout_ms   silence after which an undecided turn is dropped
    thresholds   of duplex.decide; None: the preset's
    """

    def __init__(
        self, system: System, timeout_ms: int = 2000, thresholds: tuple[float, float] | None = None
    ) -> None:
        preset = system.stage("duplex").preset
        self.system, self.timeout_ms = system, timeout_ms
        self.thresholds = thresholds or (preset.take_turn_threshold, preset.no_response_threshold)
        self.listener = Listener(system.features, system.encoder, system.adapter)
        self.before = system.llm.new_cache()
        start = system.llm.embed(system.layout.system + system.layout.user)
        system.llm.prefill(torch.cat([start, system.prompt_embedding(1)[0]])[None], self.before)

    @torch.inference_mode()
    def turns(self, waveform: Tensor) -> list[Decision]:
        """Every turn of a recording (samples,) at 16 kHz, in order; none if the gate never opens.

        A dropped turn may be followed by another; the first answer ends the rehearsal.
        """
        padded = pad_to_chunks(waveform)
        chunks = padded.view(-1, CHUNK_SAMPLES)
        mels = self.system.features(padded[None].to(self.system.device))
        found: list[Decision] = []
        while not found or found[-1].state is DialogueState.NO_RESPONSE:
            turn = self.turn(chunks, mels, found[-1].chunk + 1 if found else 0)
            if turn is None:
                break
            found.append(turn)
        return found

    def turn(self, chunks: Tensor, mels: Tensor, begin: int) -> Decision | None:
        """The next turn of chunks (chunks, samples), from chunk `begin` on; None if the gate stays shut."""
        gate = self.listener.gate
        gate.reset()
        opened = next((i for i in range(begin, len(chunks)) if gate.step(chunks[i])), None)
        if opened is None:
            return None
        for chunk, p in self.probabilities(mels, max(begin, opened - LOOK_BACK_CHUNKS)):
            if chunk < opened:  # replayed: nobody asks for these states
                continue
            if chunk > opened:
                gate.step(chunks[chunk])
            state = decide(p, *self.thresholds)
            if state is DialogueState.KEEP_LISTENING and gate.silence_ms >= self.timeout_ms:
                state = DialogueState.NO_RESPONSE
            if state is not DialogueState.KEEP_LISTENING:
                return Decision(state, chunk)
        return Decision(DialogueState.KEEP_LISTENING, len(chunks) - 1)

    def probabilities(self, mels: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
        """(chunk, probabilities (3,)) of mels (1, frames, mels) from chunk `first` on."""
        listener, llm, cache = self.listener, self.system.llm, self.before.fork()
        vectors, _ = listener.adapter(*listener.encoder(mels[:, MEL_FRAMES_PER_CHUNK * first :]))
        for block in vectors.split(LLM_VECTORS_PER_CHUNK * BLOCK_CHUNKS, dim=1):
            states = chunk_states(llm.prefill(block, cache))[0]
            yield from enumerate(self.system.state_head.probabilities(states).cpu(), start=first)
            first += len(states)


@dataclass(frozen=True)
class Outcome:
    """What became of one scene.

    kind       of the scene (see scenes.Scene)
    first      state of its first turn; KEEP_LISTENING too if the gate never opened
    answered   whether any of its turns was answered
    delay_ms   of the answer, or of the first turn's end if there was none; None without a decision
    """

    kind: str
    first: DialogueState
    answered: bool
    delay_ms: float | None

    @classmethod
    def of(cls, kind: str, turns: Sequence[Decision], last_voiced_seconds: float) -> "Outcome":
        """From the turns of a rehearsal, or from one first_decision."""
        answers = [turn for turn in turns if turn.state is DialogueState.TAKE_TURN]
        decided = [*answers, *(turn for turn in turns if turn.state is not DialogueState.KEEP_LISTENING)]
        delay = decided[0].delay_ms(last_voiced_seconds) if decided else None
        first = turns[0].state if turns else DialogueState.KEEP_LISTENING
        return cls(kind, first, bool(answers), delay)

    @property
    def early(self) -> bool:
        """Answered while the speaker had not finished."""
        return self.answered and self.delay_ms < 0

    @property
    def in_time(self) -> bool:
        """Answered after the end, and no part of it was dropped before."""
        return self.first is DialogueState.TAKE_TURN and not self.early


def shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How often each thing happens to some scenes: answered in time, answered early, dropped first, left waiting."""
    count = max(1, len(outcomes))
    return {
        "answered": sum(o.in_time for o in outcomes) / count,
        "early": sum(o.first is DialogueState.TAKE_TURN and o.early for o in outcomes) / count,
        "dropped": sum(o.first is DialogueState.NO_RESPONSE for o in outcomes) / count,
        "waiting": sum(o.first is DialogueState.KEEP_LISTENING for o in outcomes) / count,
    }
