"""Scripted two-sided conversations: what the user says first, and what is heard while the answer is played.

After the scenarios of Full-Duplex-Bench v1 (pause, turn taking, interruption) and v1.5 (overlaps). How they are made is
ours, out of the scenes of scenes.py with voices that no training has heard. Used by: conversation.py, notebook 10.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sentences
from .audio import SAMPLE_RATE_HZ
from .duplex import DialogueState
from .samples import generator_for, random_voice
from .scenes import (
    NOT_ADDRESSED_KINDS,
    Made,
    Scene,
    duplex_sample,
    plan_complete,
    plan_not_addressed,
    plan_scene,
    synthesize_scenes,
)
from .simulation import Simulation

ALONE = ("turn", "pause")
OVERLAPS = ("interruption", "back_channel", "other_person", "background")
DISTURBANCES = ("noise", "blip", "echo")
OPENERS = (
    "Tell me something about the history of bread.",
    "How do I plan a long walk in the mountains?",
    "Explain to me how a bicycle works.",
    "What should I know before I buy a boat?",
)
NEVER = (1.0, 1.0)  # thresholds that no probability exceeds
LEAD_SECONDS = 1.2  # of the answer are heard before something happens
WAIT_SECONDS = 2.4  # longer than the time-out
ANSWER_SECONDS = 12.0  # for an answer to begin, on a slow machine too
BLIP_SECONDS, BLIP_EVERY_SECONDS = 0.06, 0.5
ECHO_DB = -25.0  # of what is played, in the microphone


@dataclass(frozen=True)
class Scenario:
    """One conversation, planned. `then` is heard while the answer to `first` is played; None: nothing, or an echo."""

    kind: str
    first: Scene
    then: Scene | None = None


def plan_scenarios(kind: str, count: int, seed: int, split: str = "test") -> list[Scenario]:
    """`count` conversations of one kind of ALONE, OVERLAPS or DISTURBANCES."""
    if kind == "turn":
        return [Scenario(kind, plan_complete(q, 0, seed + i, split)) for i, q in asked(count, seed, split)]
    if kind == "pause":
        cut = [(i, q) for i, q in asked(4 * count, seed, split) if q.cut][:count]
        return [Scenario(kind, plan_complete(q, 1, seed + i, split)) for i, q in cut]
    return [plan_overlap(kind, i, q, seed, split) for i, q in asked(count, seed, split)]


def asked(count: int, seed: int, split: str) -> list[tuple[int, sentences.Question]]:
    return list(enumerate(sentences.questions(count, seed, split)))


def plan_overlap(kind: str, index: int, question: sentences.Question, seed: int, split: str) -> Scenario:
    """A question with a long answer, and what happens meanwhile."""
    generator = sentences.stream(seed, split, f"{kind} scenario {index}")
    opener, voice = OPENERS[index % len(OPENERS)], random_voice(generator, split)
    first = plan_scene(f"opener-{kind}", index, [opener], generator, split, seed, voice, tail=(0.2, 0.4))
    if kind == "echo":
        return Scenario(kind, first)
    if kind in ("interruption", "blip"):
        then = plan_scene(kind, index, [question.text], generator, split, seed, voice)
    else:
        place = len(NOT_ADDRESSED_KINDS) * index + NOT_ADDRESSED_KINDS.index(kind)
        then = plan_not_addressed(place, seed, split)
    return Scenario(kind, first, then)


def voiced(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """The same conversations with all their sound."""
    scenes = {s.id: s for one in scenarios for s in (one.first, one.then) if s is not None}
    made = {scene.id: scene for scene in synthesize_scenes(list(scenes.values()), progress=False)}
    return [
        dataclasses.replace(one, first=made[one.first.id], then=one.then and made[one.then.id])
        for one in scenarios
    ]


@dataclass(frozen=True)
class Played:
    """What became of one conversation; times in seconds of simulated time.

    spoke        first and last voiced moment of what is judged: `first` if it stands alone, else `then`
    began        when the answer to it was first heard; None: it was not answered
    early        an answer was heard before the last voiced moment of a turn that stands alone
    reopened     how often a decision was taken back before anything was heard
    overlapped   whether an answer was being played when `then` began; only then it counts
    stopped      when the player was flushed; None: it played on
    flushes      how often
    opened       turns that the gate opened after `first`
    decided      end of speech to decision, ms; None: not taken
    parts        milliseconds by part from the decision to the first sound, of the answer that counts
    underrun     seconds of silence within the answers
    """

    kind: str
    spoke: tuple[float, float]
    began: float | None
    early: bool = False
    reopened: int = 0
    overlapped: bool = True
    stopped: float | None = None
    flushes: int = 0
    opened: int = 0
    decided: float | None = None
    parts: dict[str, float | None] = dataclasses.field(default_factory=dict)
    underrun: float = 0.0


def play(scenario: Scenario, simulation: Simulation, seed: int, number: int) -> Played:
    """Let a conversation happen. `number` seeds its rooms and noises."""
    generator = generator_for(seed, number)
    if scenario.kind in ALONE:
        return play_alone(scenario, simulation, duplex_sample(scenario.first, generator))
    return play_overlap(scenario, simulation, generator)


def play_alone(scenario: Scenario, simulation: Simulation, made: Made) -> Played:
    """One turn to a silent system, heard to the end of its answer."""
    sim, player = simulation, simulation.player
    sim.hear(made.waveform)
    sim.wait(WAIT_SECONDS, lambda: sim.session.answer is not None)
    sim.wait(60.0, lambda: sim.session.answer is None and not player.sounding)
    spoke = (made.segments[0][0], made.segments[-1][1])
    begun = [start for turn, start in player.starts.items()]
    answers = [start for start in begun if start >= spoke[1]]
    taken = [at for at, event in sim.events("closed") if event.data["state"] == DialogueState.TAKE_TURN]
    return Played(
        scenario.kind,
        spoke,
        began=answers[0] if answers else None,
        early=any(start < spoke[1] for start in begun),
        reopened=len(sim.events("reopened")),
        flushes=len(player.stops),
        decided=1000 * (taken[-1] - spoke[1]) if answers else None,
        parts=parts(sim) if answers else {},
        underrun=player.underrun_seconds,
    )


def play_overlap(scenario: Scenario, simulation: Simulation, generator: torch.Generator) -> Played:
    """The system is made to answer `first`; what it does when `then` comes is its own decision."""
    sim, player, session = simulation, simulation.player, simulation.session
    thresholds, session.thresholds = session.thresholds, NEVER
    sim.hear(duplex_sample(scenario.first, generator).waveform)
    sim.take_turn()
    session.thresholds = thresholds
    sim.wait(ANSWER_SECONDS, lambda: player.played >= LEAD_SECONDS * 24_000 or session.answer is None)
    begin, sounding, opened = sim.input_seconds, player.sounding, session.turns
    waveform, (first, last) = disturbance(scenario, generator)
    sim.hear(waveform)
    sim.wait(WAIT_SECONDS)
    stops, starts = player.stops, player.starts
    sim.wait(ANSWER_SECONDS, lambda: not stops or max(starts) > stops[0][0])
    answers = [start for turn, start in starts.items() if stops and turn > stops[0][0]]
    return Played(
        scenario.kind,
        (begin + first, begin + last),
        began=answers[0] if answers else None,
        overlapped=sounding,
        stopped=stops[0][1] if stops else None,
        flushes=len(stops),
        opened=session.turns - opened,
        underrun=player.underrun_seconds,
    )


def disturbance(scenario: Scenario, generator: torch.Generator) -> tuple[Tensor, tuple[float, float]]:
    """What is heard during the answer (samples,) at 16 kHz, and its first and last voiced second."""
    if scenario.then is None:  # the echo: the room is silent
        return torch.zeros(3 * SAMPLE_RATE_HZ), (0.0, 3.0)
    made = duplex_sample(scenario.then, generator)
    waveform, spoke = made.waveform, (made.segments[0][0], made.segments[-1][1])
    if scenario.kind == "blip":
        seconds = torch.arange(len(waveform)) / SAMPLE_RATE_HZ - spoke[0]
        waveform = waveform * (seconds.remainder(BLIP_EVERY_SECONDS) < BLIP_SECONDS)
    return waveform, spoke


def parts(simulation: Simulation) -> dict[str, float | None]:
    """Milliseconds by part of the newest answer, wall-clock."""
    between = simulation.session.stopwatch.between_ms
    return {
        "decision to first text": between("decision", "first_text"),
        "first text to first speech token": between("first_text", "first_token"),
        "first speech token to first sound": between("first_token", "first_pcm"),
        "decision to first sound": between("decision", "first_pcm"),
    }
