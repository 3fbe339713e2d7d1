"""What a conversation with the whole system is like, on a simulated clock: one function a part of the measure.

Paper: "Design for duplex dialogue", table T4. Behind `freeze-omni measure conversation`. The figures are those of
Full-Duplex-Bench v1 (arXiv 2503.04721) and v1.5 (arXiv 2507.23159); what the released model reaches there stands beside
them, on other data: real and synthetic recordings of people there, espeak-ng voices of the test split here.
"""

import dataclasses
from collections.abc import Sequence

from . import evaluation, metrics
from .audio import CHUNK_MS, CHUNK_SAMPLES
from .bench import wait_for
from .dialogue import Session
from .listening import OWN_SEED, percent
from .measure import Progress
from .results import Row, row
from .samples import generator_for
from .scenarios import ECHO_DB, Played, plan_scenarios, play, voiced
from .scenes import duplex_sample
from .simulation import Load, Simulation
from .system import System
from .threads import thread_count

QUESTIONS_SHARE = 6  # a conversation takes as long as six utterances: 50 for 300 items
OVERLAPS_SHARE = 12
FAST_ENOUGH_MS = 745  # table T4: decision to first sound, mean, of the released model
GROWTH_CHUNKS = (375, 2250)  # one minute, six minutes
OTHER_DATA = "on other data"


@dataclasses.dataclass
class Stage:
    """Conversations of one kind that were played, and what the computer had to do for them."""

    played: list[Played]
    listening: Load
    speaking: Load


def act(system: System, kind: str, count: int, seed: int, echo_db: float | None = None) -> Stage:
    """Play `count` conversations of a kind, each in a session of its own, with this machine's computing time."""
    own = OWN_SEED + seed
    stage, progress = Stage([], Load(), Load()), Progress(kind, count)
    for number, scenario in enumerate(voiced(plan_scenarios(kind, count, own))):
        simulation = Simulation(Session(system, seed), echo_db=echo_db)
        stage.played.append(play(scenario, simulation, own, number))
        for total, load in ((stage.listening, simulation.listening), (stage.speaking, simulation.speaking)):
            total.spent, total.passed = total.spent + load.spent, total.passed + load.passed
        progress.add(1)
    return stage


def where_played(system: System, *more: str) -> str:
    return ", ".join(
        ["test voices", "simulated clock", f"{system.device.type}, {thread_count()} threads", *more]
    )


def at(values: Sequence[float | None], share: str, nothing: str) -> float | str:
    """The median ("p50") or 90 % ("p90") of what was reached, or why there is none."""
    found = metrics.latency_summary(values)[share]
    return f"{evaluation.NOT_MEASURED}: {nothing}" if found is None else found


# ---- one turn to a silent system -------------------------------------------------------------------------------------


def turns(system: System, items: int, seed: int) -> list[Row]:
    """Clean turns: taken or not, how soon, by part; whether the sound ever broke off; the load of the computer."""
    count = max(1, items // QUESTIONS_SHARE)
    return turn_rows(system, act(system, "turn", count, seed))


def turn_rows(system: System, stage: Stage) -> list[Row]:
    played, count = stage.played, len(stage.played)
    where, none = where_played(system), "no turn was answered"
    answered = [one for one in played if one.began is not None]
    delays = [1000 * (one.began - one.spoke[1]) for one in answered]
    v1 = f"released model 33.6 on Full-Duplex-Bench v1, {OTHER_DATA}"
    rows = [
        row(
            "turns taken", percent([one.began is not None for one in played]), count, where_played(system, v1)
        ),
        row(
            "end of speech to first sound, 50 %",
            at(delays, "p50", none),
            len(delays),
            where_played(system, f"released model 953 on Full-Duplex-Bench v1, {OTHER_DATA}"),
            "ms",
        ),
    ]
    decided = [one.decided for one in answered]
    rows.append(
        row("end of speech to decision, 90 %", at(decided, "p90", none), len(decided), where, "ms", "<= 480")
    )
    for part in answered[0].parts if answered else ():
        bar = f"<= {FAST_ENOUGH_MS}" if part == "decision to first sound" else ""
        values = [one.parts[part] for one in answered]
        rows.append(row(f"{part}, 50 %", at(values, "p50", none), len(values), where, "ms", bar))
    gaps: float | str = sum(one.underrun for one in answered)
    gaps = gaps if answered else f"{evaluation.NOT_MEASURED}: {none}"
    return [
        *rows,
        row("silence within the answers", gaps, len(answered), where, "s", "<= 0"),
        *load_rows(where, stage),
    ]


def load_rows(where: str, stage: Stage) -> list[Row]:
    """Computing time over input time."""
    found = []
    for name, load, bar in (
        ("real-time factor, listening", stage.listening, "<= 0.35"),
        ("real-time factor, listening and speaking", stage.speaking, "<= 0.8"),
    ):
        nothing = f"{evaluation.NOT_MEASURED}: it did not happen"
        figure = load.real_time_factor if load.passed else nothing
        found.append(row(name, figure, round(load.passed / (CHUNK_MS / 1000)), f"{where}, chunks", "", bar))
    return found


def pauses(system: System, items: int, seed: int) -> list[Row]:
    """Turns with a pause within a phrase: who speaks into it takes the floor from the user."""
    played = act(system, "pause", max(1, items // QUESTIONS_SHARE), seed).played
    v1 = f"released model 64.2 (synthetic), 48.1 (real) on Full-Duplex-Bench v1, {OTHER_DATA}"
    where = where_played(system)
    return [
        row(
            "false take-overs in a pause",
            percent([p.early for p in played]),
            len(played),
            where_played(system, v1),
        ),
        row("taken back before a sound", percent([p.reopened > 0 for p in played]), len(played), where),
        row("answered after the pause", percent([p.began is not None for p in played]), len(played), where),
    ]


# ---- while the system speaks -----------------------------------------------------------------------------------------


def overlaps(system: System, items: int, seed: int) -> list[Row]:
    """The four overlaps of v1.5: stop for an interruption, speak on for everything else."""
    count = max(1, items // OVERLAPS_SHARE)
    acted = {kind: act(system, kind, count, seed).played for kind in RESUMED}
    interrupted = act(system, "interruption", count, seed).played
    return interruption_rows(system, interrupted) + resumed_rows(system, acted, RESUMED)


RESUMED = {
    "back_channel": f"released model 80 on v1.5, {OTHER_DATA}",
    "other_person": f"released model 25 on v1.5, {OTHER_DATA}",
    "background": f"released model 25 on v1.5, {OTHER_DATA}",
}


def interruption_rows(system: System, played: Sequence[Played]) -> list[Row]:
    overlapped = [one for one in played if one.overlapped]
    stopped = [one for one in overlapped if one.stopped is not None]
    answered = [one for one in stopped if one.began is not None]
    where, none = where_played(system), "no interruption was taken"
    both = f"released model 72 on v1.5, 86.7 on v1, {OTHER_DATA}"
    stop = [1000 * (one.stopped - one.spoke[0]) for one in stopped]
    late = [1000 * (one.began - one.spoke[1]) for one in answered]
    once: float | str = percent([one.flushes == 1 for one in stopped])
    return [
        row(
            "interruptions taken",
            percent([o.stopped is not None for o in overlapped]),
            len(overlapped),
            where_played(system, both),
        ),
        row("interruption: its begin to silence, 50 %", at(stop, "p50", none), len(stop), where, "ms"),
        row(
            "interruption: its end to the new answer, 50 %",
            at(late, "p50", none),
            len(late),
            where_played(system, f"released model 1409 on v1, {OTHER_DATA}"),
            "ms",
        ),
        row("interruption: flushed exactly once", once, len(stopped), where, bar=">= 100"),
    ]


def resumed_rows(system: System, acted: dict[str, list[Played]], notes: dict[str, str]) -> list[Row]:
    """How often the answer went on as if nothing had happened."""
    rows = []
    for kind, played in acted.items():
        overlapped = [one for one in played if one.overlapped]
        share = percent([one.stopped is None for one in overlapped])
        where = where_played(system, *filter(None, [notes[kind]]))
        rows.append(row(f"speaks on: {kind.replace('_', ' ')}", share, len(overlapped), where))
    return rows


def disturbances(system: System, items: int, seed: int) -> list[Row]:
    """Noise, blips of 60 ms, and the echo of its own voice: nothing of it may stop an answer."""
    count = max(1, items // OVERLAPS_SHARE)
    echo = {"noise": None, "blip": None, "echo": ECHO_DB}
    acted = {kind: act(system, kind, count, seed, level).played for kind, level in echo.items()}
    rows = []
    for kind, played in acted.items():
        overlapped = [one for one in played if one.overlapped]
        stopped = percent([one.stopped is not None for one in overlapped])
        opened = percent([one.opened > 0 for one in overlapped])
        where = where_played(system, *([f"echo at {ECHO_DB:.0f} dB"] if kind == "echo" else []))
        rows.append(row(f"stops for {kind}", stopped, len(overlapped), where, bar="<= 0"))
        rows.append(row(f"gate opened by {kind}", opened, len(overlapped), where))
    return rows


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(system: System, items: int, seed: int) -> list[Row]:
    """What one more session holds beside its cache, and whether it grows while people talk to each other."""
    session = Session(system, seed, thresholds=(1.0, 0.0))  # every turn is heard and dropped
    generator, sizes = generator_for(OWN_SEED + seed), []
    speech = voiced(plan_scenarios("turn", 1, OWN_SEED + seed))[0]
    waveform = duplex_sample(speech.first, generator).waveform
    chunks = waveform.split(CHUNK_SAMPLES)[: len(waveform) // CHUNK_SAMPLES]
    progress = Progress("memory", GROWTH_CHUNKS[-1])
    for number in range(1, GROWTH_CHUNKS[-1] + 1):
        session.feed(chunks[number % len(chunks)])
        if number in GROWTH_CHUNKS:
            wait_for(system.device)
            sizes.append((held(session), session.cache.nbytes()))
        progress.add(1)
    (early, cache_early), (late, cache_late) = sizes
    where = f"tensors held, {session.turns} turns opened and dropped"
    return [
        row("memory of a session beside its LLM cache", late / 2**20, 1, where, "MiB", "<= 64"),
        row("LLM cache of a session", cache_late / 2**20, 1, where, "MiB"),
        row("growth from minute 1 to 6", late + cache_late - early - cache_early, 1, where, "bytes", "<= 0"),
    ]


def held(session: Session) -> int:
    """Bytes of the tensors of a session, its gate's network included, without the LLM cache."""
    tensors = [session.waiting, session.mel_state.carry, *session.look_back]
    tensors += [e.vectors for e in session.context.exchanges]
    tensors += [*session.gate.model.parameters(), *session.gate.remember().values()]
    if session.turn is not None:
        tensors += [*session.turn.mels, *session.turn.vectors, session.turn.adapter["carry"]]
    stream = session.turn.encoder.nbytes() if session.turn is not None else 0
    return stream + sum(tensor.nbytes for tensor in tensors)
