"""What the listening side reaches on unseen voices, sentences and wordings: one function a part of the measure.

Paper: tables T1 and T3, "Design for duplex dialogue". Behind `freeze-omni measure listening`. Every part takes the
system, the number of items that a figure rests on, and the seed, and returns rows; sound is made or loaded in batches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import bench, evaluation, metrics, stages
from .audio import CHUNK_MS, LLM_VECTORS_PER_SECOND, MEL_FRAMES_PER_CHUNK, N_MELS
from .augmentation import add_noise, make_noise
from .decisions import Outcome, Rehearsal
from .duplex import DialogueState
from .evaluation import Asked
from .fingerprint import digest
from .measure import Progress
from .results import Row, row
from .samples import (
    Batches,
    Utterance,
    collate,
    from_manifest,
    generator_for,
    load_audio,
    plan_questions,
    plan_transcription,
    synthesize,
)
from .scenes import NOT_ADDRESSED_KINDS, Scene, duplex_sample, plan_scenes, synthesize_scenes
from .system import LISTENING, System
from .threads import thread_count
from .turns import transcript_limit, transcript_row

OWN_SEED = 900_000  # far from the seeds of training runs, whose test sets chose thresholds and presets
BATCH_SECONDS = 60.0
NOISES = ("white", "pink", "hum", "chatter")
SNR_DB = 10.0
WAIT_SECONDS = 2.4  # silence after a scene: long enough for the 2 s time-out of a live session
IN_TIME_MS = 480
STREAM_PACKETS = {"10 s": 10_000 // CHUNK_MS, "an hour": 3_600_000 // CHUNK_MS}
TIMED_PACKETS = 200
RESAMPLES = 10_000


# ---- what is heard ---------------------------------------------------------------------------------------------------


def ctc(system: System, items: int, seed: int) -> list[Row]:
    """Stage 1: character error rate of greedy CTC, clean and with noise at exactly 10 dB."""
    said = clean(items, seed)
    where = f"test sentences and questions, {voices_of(said)} unseen espeak-ng voices, greedy CTC"
    read = read_all(read_ctc, system, said)
    loud = read_all(read_ctc, system, said, lambda place, waveform: noisy(waveform, seed, place))
    name, worst, count = hardest_voice(said, read)
    return [
        row("stage 1 CER, clean", error(said, read), len(said), where, bar="<= 2"),
        row("stage 1 CER, hardest voice", worst, count, f"of these, {name}"),
        row(
            f"stage 1 CER at {SNR_DB:.0f} dB SNR",
            error(said, loud),
            len(said),
            f"the same with {', '.join(NOISES)} in equal parts",
            bar="<= 12",
        ),
    ]


def llm(system: System, items: int, seed: int) -> list[Row]:
    """Stage 2: character error rate of what the frozen LLM writes, on the clean set of stage 1."""
    said = clean(items, seed)
    where = f"test sentences and questions, {voices_of(said)} unseen espeak-ng voices, LLM greedy"
    read = read_all(read_llm, system, said)
    return [row("stage 2 CER through the LLM", error(said, read), len(said), where, bar="<= 4")]


def human(system: System, items: int, seed: int) -> list[Row]:
    """Recordings of people, all there are: shown, not promised."""
    said = from_manifest(stages.root() / "data_samples" / "human.jsonl")
    people = len({utterance.speaker for utterance in said})
    where = f"recordings of {people} people; out of reach of synthetic training, shown"
    return [
        row(f"human speech, CER by {name}", error(said, read_all(read, system, said)), len(said), where)
        for name, read in {"CTC": read_ctc, "the LLM": read_llm}.items()
    ]


def clean(items: int, seed: int) -> list[Utterance]:
    return synthesize(plan_transcription(items, OWN_SEED + seed, "test"), progress=False)


def voices_of(said: Sequence[Utterance]) -> int:
    return len({utterance.voice.name for utterance in said})


def error(said: Sequence[Utterance], read: Sequence[str]) -> float:
    """Character error rate in percent."""
    return 100 * metrics.cer([utterance.text for utterance in said], read)


def hardest_voice(said: Sequence[Utterance], read: Sequence[str]) -> tuple[str, float, int]:
    """The voice with the highest error rate: its name, the rate in percent, and on how many utterances."""
    places: dict[str, list[int]] = {}
    for place, utterance in enumerate(said):
        places.setdefault(utterance.voice.name, []).append(place)
    rates = {name: error([said[i] for i in of], [read[i] for i in of]) for name, of in places.items()}
    name = max(rates, key=rates.get)
    return name, rates[name], len(places[name])


def noisy(waveform: Tensor, seed: int, place: int) -> Tensor:
    """A waveform (samples,) with noise of the kind that is next in turn, SNR_DB below it."""
    generator = generator_for(OWN_SEED + seed, place)
    return add_noise(waveform, make_noise(NOISES[place % len(NOISES)], len(waveform), generator), SNR_DB)


def batches(said: Sequence[Utterance]) -> Iterator[list[int]]:
    """Every place once, similar lengths together, about BATCH_SECONDS of sound each."""
    planned = Batches([utterance.duration_seconds for utterance in said], BATCH_SECONDS)
    return (planned[number] for number in range(len(planned)))


@torch.inference_mode()
def read_all(
    read: Callable[[System, list[Tensor]], list[str]],
    system: System,
    said: Sequence[Utterance],
    change: Callable[[int, Tensor], Tensor] = lambda place, waveform: waveform,
) -> list[str]:
    """What `read` makes of every utterance, in order, after its sound was changed by its place."""
    found, progress = [""] * len(said), Progress(read.__name__, len(said))
    for places in batches(said):
        texts = read(system, [change(place, load_audio(said[place])) for place in places])
        for place, text in zip(places, texts, strict=True):
            found[place] = text
        progress.add(len(places))
    return found


def features(system: System, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (samples,) -> mels (batch, frames, mels) and mel_lengths (batch,)."""
    padded, chunk_lengths = collate(waveforms)
    return system.features(padded.to(system.device)), MEL_FRAMES_PER_CHUNK * chunk_lengths.to(system.device)


def read_ctc(system: System, waveforms: Sequence[Tensor]) -> list[str]:
    """Greedy CTC of stage 1, as verbs.transcribe_ctc but all at once."""
    frames, lengths = system.stage1_encoder(*features(system, waveforms))
    return [system.units.decode(ids) for ids in system.stage1_ctc_head.greedy(frames, lengths)]


def read_llm(system: System, waveforms: Sequence[Tensor]) -> list[str]:
    """Greedy transcripts of the LLM, as verbs.transcribe_llm but all at once."""
    vectors, lengths = system.adapter(*system.encoder(*features(system, waveforms)))
    spoken = [of_one[:length] for of_one, length in zip(vectors, lengths.tolist(), strict=True)]
    task, layout = system.task_embedding(1)[0], system.transcript_layout
    rows = [transcript_row(system.llm, layout, task, of_one) for of_one in spoken]
    limits = [transcript_limit(len(of_one) / LLM_VECTORS_PER_SECOND) for of_one in spoken]
    return evaluation.write_together(system.llm, rows, limits, batch=32)


# ---- what is understood ----------------------------------------------------------------------------------------------


def questions(system: System, items: int, seed: int) -> list[Row]:
    """Stage 3: the same questions by speech and by text to the same frozen LLM."""
    plan = answerable(items, OWN_SEED + seed)
    said, progress = synthesize(plan, progress=False), Progress("questions", items)
    said.sort(key=lambda question: question.duration_seconds)  # rows of similar length are padded least
    found: list[Asked] = []
    for begin in range(0, len(said), 32):
        found += evaluation.asked(system, said[begin : begin + 32])
        progress.add(len(said[begin : begin + 32]))
    different = len({question.text for question in plan})
    where = f"test wordings, {different} different, {voices_of(said)} unseen voices, judge: accepted answers as words"
    by_text = [item.accepts(item.by_text) for item in found]
    by_speech = [item.accepts(item.by_speech) for item in found]
    lost = [100.0 * (text - speech) for text, speech in zip(by_text, by_speech, strict=True)]
    same = [item.by_text == item.by_speech for item in found]
    short = row(
        "spoken QA: text minus speech",
        sum(lost) / len(lost),
        items,
        f"{where}; paired bootstrap, 95 %",
        "points",
        "<= 5",
        interval(lost, seed),
    )
    return [
        row("spoken QA: accuracy by text", percent(by_text), items, where),
        row("spoken QA: accuracy by speech", percent(by_speech), items, where),
        short,
        row("spoken QA: same answer, word for word", percent(same), items, where),
    ]


def answerable(items: int, seed: int) -> list[Utterance]:
    """Test questions with accepted answers; each is asked once before any is asked again in another voice."""
    count = items
    while len(found := [u for u in plan_questions(count, seed, "test") if u.answers]) < items:
        count *= 2
    return found[:items]


def percent(happened: Sequence[bool]) -> float | str:
    if not happened:
        return f"{evaluation.NOT_MEASURED}: no such item among so few"
    return 100 * sum(happened) / len(happened)


def interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % interval of the mean of values, by drawing them anew RESAMPLES times."""
    sample = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(sample), (RESAMPLES, len(sample)), generator=generator_for(seed))
    low, high = sample[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


# ---- when to speak ---------------------------------------------------------------------------------------------------


def duplex(system: System, items: int, seed: int) -> list[Row]:
    """The state head in scenes: `items` complete questions, 4/5 as many not addressed, 1/5 as many unfinished."""
    rehearsal, own = Rehearsal(system), OWN_SEED + seed
    plan = plan_scenes(items, -(-4 * items // 5), -(-items // 5), own, "test")
    scenes = synthesize_scenes([waited(scene) for scene in plan], progress=False)
    progress, found = Progress("duplex", len(scenes)), []
    for number, scene in enumerate(scenes):
        made = duplex_sample(scene, generator_for(own, number))
        turns = rehearsal.turns(made.waveform)
        found.append((scene, Outcome.of(scene.kind, turns, made.timeline.last_voiced_seconds)))
        progress.add(1)
    return duplex_rows(found)


def waited(scene: Scene) -> Scene:
    """The same scene with a silent end in which every turn is decided or timed out, as in a live session."""
    *before, end = scene.pauses_seconds
    return dataclasses.replace(scene, pauses_seconds=(*before, max(end, WAIT_SECONDS)))


def duplex_rows(found: Sequence[tuple[Scene, Outcome]]) -> list[Row]:
    """The table of scenes and their outcomes.

    A pause after a complete phrase ("..., please?") stands apart: to answer there is no mistake, nor is to wait.
    """
    complete = [outcome for scene, outcome in found if scene.addressed and scene.complete]
    whole = [outcome for outcome in complete if outcome.kind != "pause_complete"]
    broken = [outcome for scene, outcome in found if scene.addressed and not scene.complete]
    others = [outcome for scene, outcome in found if not scene.addressed]
    where = "complete test questions without an afterthought, unseen voices, decided as in a live session"
    rows = [row("take-turn recall", percent([o.in_time for o in whole]), len(whole), where, bar=">= 95")]
    for kind in ("plain", "hesitation", "pause_incomplete", "pause_complete"):
        of_kind = [outcome for outcome in complete if outcome.kind == kind]
        share = percent([outcome.in_time for outcome in of_kind])
        rows.append(row(f"take-turn recall, {kind}", share, len(of_kind), "after the last voiced sample"))
    for kind in ("pause_incomplete", "hesitation", "pause_complete", "plain"):
        of_kind = [outcome for outcome in complete if outcome.kind == kind]
        bar = "< 5" if kind == "pause_incomplete" else ""
        share = percent([outcome.early for outcome in of_kind])
        rows.append(row(f"early take-turns, {kind}", share, len(of_kind), "before it", bar=bar))
    dropped = percent([o.first is DialogueState.NO_RESPONSE for o in whole])
    rows.append(row("complete questions dropped", dropped, len(whole), "at their first decision"))
    rows += delay_rows(whole)
    for kind in NOT_ADDRESSED_KINDS:
        of_kind = [outcome for outcome in others if outcome.kind == kind]
        share = percent([not outcome.answered for outcome in of_kind])
        rows.append(row(f"rejected, {kind}", share, len(of_kind), "never answered, in any turn", bar="> 90"))
    share = percent([not outcome.answered for outcome in broken])
    return [*rows, row("unfinished questions not answered", share, len(broken), "broken off, then silence")]


def delay_rows(complete: Sequence[Outcome]) -> list[Row]:
    """How long after the last voiced sample a question is answered, in input time."""
    delays = [outcome.delay_ms for outcome in complete if outcome.in_time]
    found = metrics.latency_summary(delays)
    none = f"{evaluation.NOT_MEASURED}: no question was answered in time"
    rows = [
        row(
            f"decision delay, {share}",
            none if found[key] is None else found[key],
            len(delays),
            "questions answered after their end, without computing time",
            "ms",
        )
        for share, key in {"50 %": "p50", "90 %": "p90"}.items()
    ]
    quick = percent([outcome.in_time and outcome.delay_ms <= IN_TIME_MS for outcome in complete])
    where = "all questions of the recall; dropped, early or undecided ones count against it"
    return [*rows, row(f"answered within {IN_TIME_MS} ms", quick, len(complete), where, bar=">= 90")]


# ---- the stream and the LLM ------------------------------------------------------------------------------------------


def stream(system: System, items: int, seed: int) -> list[Row]:
    """Encoder and adapter packet by packet: speed, and the memory of a stream after 10 s and after an hour."""
    packets = listening_stream(system, seed)
    sizes, fed = {}, 0
    with torch.inference_mode():
        progress = Progress("stream", STREAM_PACKETS["an hour"])
        timed = bench.measure([packets], TIMED_PACKETS)[0]
        packets = listening_stream(system, seed)  # a fresh one: the sizes count from the first packet
        for name, count in STREAM_PACKETS.items():
            for _ in range(count - fed):
                packets.packet()
                progress.add(1)
            sizes[name], fed = packets.nbytes(), count
    short, long = sizes.values()
    where = f"trained encoder + adapter, {system.device.type}, {thread_count()} threads, median"
    hour = f"{fed} packets of {CHUNK_MS} ms"
    return [
        row("real-time factor of a packet", timed.real_time_factor, TIMED_PACKETS, where, "", "< 0.1"),
        row("stream state after 10 s", short / 1024, STREAM_PACKETS["10 s"], "one stream", "KiB"),
        row("stream state, growth to an hour", long - short, fed, hour, "bytes", "<= 0"),
    ]


def listening_stream(system: System, seed: int) -> bench.Stream:
    """One stream of the trained encoder and adapter, fed with the same random packet again and again."""
    generator = generator_for(OWN_SEED + seed)
    mels = torch.randn(1, MEL_FRAMES_PER_CHUNK, N_MELS, generator=generator).to(system.device)
    state, adapter_state = system.encoder.start(), system.adapter.start()
    return bench.Stream(
        "encoder + adapter",
        lambda: system.adapter.step(system.encoder.step(mels, state), adapter_state).cpu(),  # waits for a GPU
        lambda: state.nbytes() + sum(tensor.nbytes for tensor in adapter_state.values()),
    )


def frozen(system: System, items: int, seed: int) -> list[Row]:
    """The LLM's fingerprint now against those that the stages recorded after their training."""
    now = digest(system.llm.fingerprint())
    recorded = {name: system.stage(name).metrics.get("llm_fingerprint") for name in LISTENING}
    recorded = {name: value for name, value in recorded.items() if value}
    changed: float | str = sum(value != now for value in recorded.values())
    if not recorded:
        changed = f"{evaluation.NOT_MEASURED}: no stage recorded a fingerprint"
    where = f"fingerprint {now}, recorded by {', '.join(recorded) or 'none'}"
    return [row("LLM changed since training", changed, len(recorded), where, "stages", "<= 0")]
