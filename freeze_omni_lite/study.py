"""Studies: a question answered by a table of small trainings ("arms") of the course's own notebooks.

An arm is what `freeze-omni run` could be asked for: notebooks, changed settings, a seed, and the variant that keeps
its stages apart (runs/<scale>/<stage>@<study>-<arm>). Its result is what the notebooks wrote into stage.json and
metrics.jsonl. Behind `freeze-omni study`; the notebooks draw what was published in data_samples/results.
"""

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import results, scales
from .course import NOTEBOOKS, ROOT, Notebook, Settings, check_request, parse_changes, read_json, select
from .errors import InputError
from .files import atomic_write_json
from .kernel import NotebookFailed
from .run import run

ARM_MINUTES = 6  # of one training, on 2 CPU cores at `laptop`


@dataclass(frozen=True)
class Share:
    """A part of a preset's own number, so that arms are short at every scale.

    least   never less, unless the preset itself has less: below it the notebook's own claims cannot hold yet
    """

    part: float
    least: float

    def of(self, value: float) -> float:
        """In the type of `value`: whole numbers stay whole."""
        return min(value, type(value)(max(self.least, round(self.part * value, 6))))


@dataclass(frozen=True)
class Arm:
    """One small training: what it changes ("stage.field" -> value or Share), and what it adds to the seed."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One figure of an arm: its label with the unit, its place "stage.metric[.key ...]" in stage.json, a factor."""

    label: str
    place: str
    times: float = 1.0


@dataclass(frozen=True)
class Study:
    """A question and its arms.

    common   changes of every arm
    curves   label -> "stage.column" of metrics.jsonl
    clock    what curves are drawn against: "step", or "seconds" up to where the shortest arm ends (equal budgets)
    """

    question: str
    notebooks: tuple[str, ...]
    arms: tuple[Arm, ...]
    common: dict[str, Any]
    results: tuple[Result, ...]
    curves: dict[str, str]
    clock: str = "step"


# ---- the studies -----------------------------------------------------------------------------------------------------

# What all arms share: they compare, so half an encoder on half the batch, without augmentation, is enough, and more
# steps fit into their minutes. The least is what the tiny preset has, where the notebooks' claims just hold.
SHORT_CTC = {
    "encoder_ctc.layers": Share(0.5, least=2),
    "encoder_ctc.batch_seconds": Share(0.5, least=8),
    "encoder_ctc.steps": Share(0.6, least=240),
    "encoder_ctc.augment_share": 0.0,
}
SHORT_ADAPTER = {
    "encoder_adapter.batch_seconds": Share(0.5, least=4),
    "encoder_adapter.steps": Share(0.4, least=27),
    "encoder_adapter.warm_start_steps": Share(0.4, least=20),
    "encoder_adapter.naive_steps": 1,  # of the naive training that notebook 03 shows: here it is an arm of its own
}
SHORT_PROMPT = {"encoder_prompt.steps": Share(0.5, least=6)}
SHORT_DUPLEX = {
    "duplex.complete": Share(0.5, least=9),
    "duplex.not_addressed": Share(0.5, least=6),
    "duplex.unfinished": Share(0.5, least=3),
    "duplex.steps": Share(0.5, least=120),
}
CTC_RESULTS = (
    Result("CER (%) by chunk in decoding", "encoder_ctc.cer_percent_by_chunk"),
    Result("CER (%)", "encoder_ctc.test_cer", 100),
)
# The speech decoder on fewer steps: at `laptop` 06 trains for about five minutes then, 07 for two.
SHORT_SPEECH = {"decoder_nar_ar.steps": Share(0.4, least=60), "decoder_nar_ar.pair_steps": 1}
SHORT_PREFIX = {"decoder_prefix.steps": Share(0.4, least=60)}
SPEECH_RESULTS = (
    Result("speech CER (%) of unseen sentences", "decoder_nar_ar.speech_cer", 100),
    Result("loss on unseen sentences (nats per token)", "decoder_nar_ar.test_loss"),
    Result("worth of the right text (nats per token)", "decoder_nar_ar.text_gain"),
)
QA_RESULTS = (
    Result("right answers (%)", "encoder_prompt.qa_accuracy.spoken, after", 100),
    Result("answer loss (nats per token)", "encoder_prompt.answer_loss"),
)

STUDIES: dict[str, Study] = {
    "chunk": Study(
        "Which chunk size should the encoder be trained with, and does drawing it anew for every batch serve all?",
        ("02",),
        (
            *(Arm(str(size), {"encoder_ctc.chunk_frames": size}) for size in (1, 2, 4, 8)),
            Arm("dynamic", {"encoder_ctc.dynamic_chunks": True}),
        ),
        SHORT_CTC,
        CTC_RESULTS,
        {"CTC loss (nats per character)": "encoder_ctc.loss"},
    ),
    "left_context": Study(
        "How many earlier chunks does the encoder need to see?",
        ("02",),
        (
            *(Arm(str(chunks), {"encoder_ctc.left_chunks": chunks}) for chunks in (2, 4, 8, 16)),
            Arm("all", {"encoder_ctc.left_chunks": -1}),
        ),
        SHORT_CTC,
        CTC_RESULTS[1:],
        {"CTC loss (nats per character)": "encoder_ctc.loss"},
    ),
    "warm_start": Study(
        "Does the frozen LLM's loss alone teach the adapter to speak to it, given the seconds that a warm start has?",
        ("03",),
        (
            Arm("warm start"),
            Arm(
                "naive",
                {
                    "encoder_adapter.warm_start_steps": 0,
                    "encoder_adapter.token_ctc_weight": 0.0,
                    "encoder_adapter.ctc_weight": 0.0,
                    # a step through the LLM costs several of the warm start
                    "encoder_adapter.steps": Share(0.15, least=27),
                },
            ),
        ),
        SHORT_ADAPTER | {"encoder_adapter.report_every": 2},
        (
            Result("CER (%)", "encoder_adapter.test_cer_llm", 100),
            Result("LLM loss on unseen speech (nats per token)", "encoder_adapter.test_llm_loss"),
        ),
        {"LLM loss (nats per token)": "encoder_adapter.llm"},
        clock="seconds",
    ),
    "prompts": Study(
        "How many prompt embeddings turn transcribing into answering?",
        ("04",),
        tuple(Arm(str(count), {"encoder_prompt.prompt_embeddings": count}) for count in (0, 1, 5, 25)),
        SHORT_PROMPT,
        QA_RESULTS,
        {"answer loss (nats per token)": "encoder_prompt.answer"},
    ),
    "head": Study(
        "Does the state head lose or gain, and do the answers, when it trains together with the prompt embeddings?",
        ("04", "08"),
        (
            Arm("joint"),
            Arm("separate", {"encoder_prompt.state_weight": 0.0}),
        ),
        SHORT_PROMPT | SHORT_DUPLEX,
        (
            *QA_RESULTS,
            Result("balanced accuracy (%) after stage 3", "duplex.balanced_accuracy.test.stage 3", 100),
            Result("balanced accuracy (%) after the head's own", "duplex.balanced_accuracy.test.now", 100),
        ),
        {"state loss of the head's own training (nats)": "duplex.loss"},
    ),
    "seeds": Study(
        "How far do the error rates of stage 1 and stage 2 spread when only the seed differs?",
        ("02", "03"),
        tuple(Arm(str(number + 1), seed=number) for number in range(3)),
        SHORT_CTC
        | SHORT_ADAPTER
        | {
            "encoder_ctc.utterances": Share(0.3, least=48),
            "encoder_adapter.utterances": Share(0.3, least=32),
        },
        (
            Result("stage 1 CER (%)", "encoder_ctc.test_cer", 100),
            Result("stage 2 CER (%) through the LLM", "encoder_adapter.test_cer_llm", 100),
        ),
        {"CTC loss (nats per character)": "encoder_ctc.loss"},
    ),
    "t2": Study(
        "What are prefix, pre-network and top-k worth in understood speech (the paper's table T2)?",
        ("06", "07"),
        (
            *(Arm(f"pre-network {number + 1}", seed=number) for number in range(3)),
            *(
                Arm(f"none {number + 1}", {"decoder_nar_ar.pre_network_layers": 0}, number)
                for number in range(3)
            ),
        ),
        SHORT_SPEECH | SHORT_PREFIX | {"decoder_prefix.judged": 40, "decoder_prefix.most_top_k": 5},
        (
            Result("CER (%) with prefix, by top-k", "decoder_prefix.cer_by_top_k.with prefix", 100),
            Result("CER (%) without prefix, by top-k", "decoder_prefix.cer_by_top_k.without prefix", 100),
            Result("loss on unseen answers (nats per token)", "decoder_prefix.losses.unseen_answers"),
        ),
        {"loss of stage 3 (nats per token)": "decoder_prefix.loss"},
    ),
    # of the corpus at hand: with 20 h (--set speech_tokens.sentences=16000 and answers=5000 in notebook 05) these
    # are 1, 2, 5, 10 and 20 h, voiced once
    "hours": Study(
        "How many hours of speech does the speech decoder need?",
        ("06",),
        tuple(
            Arm(str(share), {"decoder_nar_ar.corpus_share": share}) for share in (0.05, 0.1, 0.25, 0.5, 1.0)
        ),
        SHORT_SPEECH,
        (Result("hours of speech", "decoder_nar_ar.speech_hours"), *SPEECH_RESULTS),
        {"loss on unseen sentences (nats per token)": "decoder_nar_ar.test_loss"},
    ),
    "spelling": Study(
        "Does it help to spell the tokens out, and to let text and speech run side by side?",
        ("06",),
        (
            Arm("as the paper", {"decoder_nar_ar.spelled": False, "decoder_nar_ar.stretch": 0.0}),
            Arm("stretched", {"decoder_nar_ar.spelled": False, "decoder_nar_ar.stretch": 5.7}),
            Arm("spelled", {"decoder_nar_ar.spelled": True, "decoder_nar_ar.stretch": 0.0}),
            Arm("both", {"decoder_nar_ar.spelled": True, "decoder_nar_ar.stretch": 2.75}),
        ),
        SHORT_SPEECH,
        SPEECH_RESULTS,
        {"loss on unseen sentences (nats per token)": "decoder_nar_ar.test_loss"},
    ),
}


def get(name: str) -> Study:
    """Raises InputError for an unknown study."""
    scales.check(name, STUDIES, "study")
    return STUDIES[name]


# ---- one arm ---------------------------------------------------------------------------------------------------------


def variant_of(name: str, arm: Arm) -> str:
    return f"{name}-{arm.name}".replace(" ", "-")


def changes_of(study: Study, arm: Arm, scale: str, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """ "stage.field" -> value of an arm at a scale; `wanted` (by stage, from --set) wins over what all arms share.

    Raises InputError if --set names a setting in which the arms differ.
    """
    asked = {f"{stage}.{name}": value for stage, fields in wanted.items() for name, value in fields.items()}
    for place in asked:
        if any(place in other.changes for other in study.arms):
            raise InputError(
                f"--set names {place}, in which the arms of this study differ: leave it out, or use freeze-omni run."
            )
    changes = {}
    for place, value in (study.common | arm.changes | asked).items():
        stage, name = place.split(".")
        own = scales.load(stage, scale).values()
        changes[place] = value.of(own[name]) if isinstance(value, Share) else value
    return changes


def as_options(changes: dict[str, Any]) -> list[str]:
    """As --set takes them."""
    return [f"{place}={value!r}" for place, value in changes.items()]


def results_of(study: Study, settings: Settings, chosen: list[Notebook]) -> dict[str, Any]:
    """Results, curves and training seconds of a finished arm, from the stage folders of its notebooks."""
    from .training import METRICS_FILE, read_rows

    folders = {notebook.stage: settings.folder(notebook) for notebook in chosen}
    records = {stage: read_json(folder / "stage.json") for stage, folder in folders.items()}
    curves = {}
    for label, place in study.curves.items():
        stage, column = place.split(".")
        rows = [row for row in read_rows(folders[stage] / METRICS_FILE) if column in row]
        names = {"step": "step", "seconds": "seconds", "value": column}
        curves[label] = {name: [rounded(row[key]) for row in rows] for name, key in names.items()}
    return {
        "training_seconds": {stage: record["seconds"] for stage, record in records.items()},
        "commit": next(iter(records.values()))["commit"],
        "results": {result.label: value_at(records, result) for result in study.results},
        "curves": curves,
    }


def value_at(records: dict[str, Any], result: Result) -> float | dict[str, float] | None:
    """The number, or numbers by name, at a result's place; None where no judge was good enough to measure it."""
    stage, *path = result.place.split(".")
    value = records[stage]["metrics"]
    for key in path:
        value = value[key] if value is not None else None
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: rounded(result.times * number) for name, number in value.items()}
    return rounded(result.times * value)


def rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


# ---- a whole study ---------------------------------------------------------------------------------------------------


def place_of(name: str, scale: str, runs: str) -> Path:
    """Where the result of a study lies: runs/<scale>/studies/<name>.json."""
    return ROOT / runs / scale / "studies" / f"{name}.json"


def run_study(
    name: str,
    scale: str,
    *,
    changes: list[str] | None = None,
    seed: int = 1,
    runs: str = "runs",
    device: str | None = None,
    notebooks: Path = NOTEBOOKS,
) -> Path:
    """Train every arm that is not there yet, print the table, and return the path of the result's JSON.

    The JSON is written anew after every arm. An arm whose last run agrees is kept, a broken one goes on where it
    stopped, and one whose notebook fails is noted while the others go on.

    Raises InputError before anything runs if the request is wrong, NotebookFailed at the end if an arm failed.
    """
    study, asked = get(name), list(changes or [])
    refuse_ranks()
    chosen = select(list(study.notebooks), notebooks)
    wanted = parse_changes(asked, scale, chosen)
    plan = []
    for arm in study.arms:
        changed = changes_of(study, arm, scale, wanted)
        by_stage = parse_changes(as_options(changed), scale, chosen)
        settings = Settings(scale, by_stage, seed + arm.seed, runs, variant_of(name, arm))
        check_request(chosen, settings)
        plan.append((arm, changed, settings))

    record = {
        "what": published(name),
        "question": study.question,
        "scale": scale,
        "seed": seed,
        "clock": study.clock,
    }
    record |= conditions(name, scale, asked, seed) | {"arms": []}
    place, logs = place_of(name, scale, runs), []
    for number, (arm, changed, settings) in enumerate(plan, start=1):
        print(f"arm {number} of {len(plan)}: {arm.name} ({', '.join(as_options(changed))})", flush=True)
        about = {"name": arm.name, "variant": settings.variant, "seed": settings.seed, "changes": changed}
        found, log = run_arm(study, settings, chosen, as_options(changed), device, notebooks)
        record["arms"].append(about | found)
        logs += [log] if log else []
        atomic_write_json(place, record)
    print(table(record))
    print(f"study {name}: {place.relative_to(ROOT) if place.is_relative_to(ROOT) else place}", flush=True)
    failed = [arm["failed"] for arm in record["arms"] if "failed" in arm]
    if failed:
        raise NotebookFailed(
            f"{len(failed)} of {len(plan)} arms of study {name} failed, the first: {failed[0]}", logs[0]
        )
    return place


def refuse_ranks() -> None:
    """Raise InputError under torchrun: arms are small, and ranks agree on one run of notebooks only."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a study got several ranks, expected one process: start freeze-omni study without torchrun."
        )


def run_arm(
    study: Study,
    settings: Settings,
    chosen: list[Notebook],
    options: list[str],
    device: str | None,
    folder: Path,
) -> tuple[dict[str, Any], str]:
    """What an arm found, or {"failed": sentence}; and the end of the traceback if it failed."""
    try:
        run(
            [notebook.number for notebook in chosen],
            settings.scale,
            changes=options,
            variant=settings.variant,
            seed=settings.seed,
            runs=settings.runs,
            resume=True,
            device=device,
            notebooks=folder,
        )
    except NotebookFailed as error:
        print(f"failed: {error}", flush=True)
        return {"failed": str(error)}, error.log or str(error)
    return results_of(study, settings, chosen), ""


def conditions(name: str, scale: str, changes: list[str], seed: int) -> dict[str, Any]:
    """What a figure needs beside it: date, commit, command, machine, versions."""
    from .bench import cpu_name
    from .stages import circumstances

    options = [f"--set {text}" for text in changes] + ([f"--seed {seed}"] if seed != 1 else [])
    command = " ".join(["freeze-omni study", name, f"--scale {scale}", *options])
    return {
        "command": command,
        "cpu": cpu_name(),
        "budget_minutes_per_training": ARM_MINUTES,
    } | circumstances()


def table(record: dict[str, Any]) -> str:
    """A line for every number, training minutes last, and a column for every arm; aligned."""
    columns = [cells(arm) for arm in record["arms"]]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    lines = [["", *(arm["name"] for arm in record["arms"])]]
    lines += [[label, *(column.get(label, "failed") for column in columns)] for label in labels]
    width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([label.ljust(width), *(t.rjust(w) for t, w in zip(texts, widths, strict=True))])
        for label, *texts in lines
    )


def cells(arm: dict[str, Any]) -> dict[str, str]:
    """Label -> number of an arm, as text; nothing for one that failed."""
    numbers = {}
    for label, value in arm.get("results", {}).items():
        numbers |= (
            {f"{label}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {label: value}
        )
    if numbers:
        numbers["training (min)"] = sum(arm["training_seconds"].values()) / 60
    return {label: "not measured" if value is None else f"{value:.3g}" for label, value in numbers.items()}


def listing(scale: str) -> str:
    """Every study: its question, its notebooks, and what each arm changes at a scale."""
    scales.check(scale, scales.SCALES, "scale")
    lines = []
    for name, study in STUDIES.items():
        count = len(study.arms)
        lines += [f"{name}: {study.question}", f"  {count} arms of notebook {', '.join(study.notebooks)}"]
        shared = changes_of(study, Arm(""), scale, {})
        lines.append(f"  each: {', '.join(as_options(shared))}")
        for arm in study.arms:
            own = {place: v for place, v in changes_of(study, arm, scale, {}).items() if place in arm.changes}
            seed = [f"seed + {arm.seed}"] if arm.seed else []
            lines.append(f"  {arm.name}: {', '.join(as_options(own) + seed) or 'nothing more'}")
    lines.append(f"Budget: {ARM_MINUTES} minutes a training on 2 CPU cores at laptop.")
    return "\n".join(lines)


# ---- published results -----------------------------------------------------------------------------------------------


def published(name: str) -> str:
    """Its name among the results worth citing."""
    return f"study_{name}"


def publish(name: str, scale: str, runs: str = "runs") -> Path:
    """Copy the result of a finished study into data_samples/results, with the conditions it was measured under.

    Raises InputError if an arm is missing or failed.
    """
    study, place = get(name), place_of(name, scale, runs)
    record = read_json(place)
    done = [arm["name"] for arm in record.get("arms", []) if "results" in arm]
    lacking = [arm.name for arm in study.arms if arm.name not in done]
    if lacking:
        raise InputError(
            f"study {name} at scale {scale} has {len(done)} of {len(study.arms)} arms, arm {lacking[0]} is missing: "
            f"finish it with freeze-omni study {name} --scale {scale}."
        )
    return results.write(record)


def figure(name: str) -> str:
    """Draw the published result of a study and return the sentence below it; without one, say so and draw nothing."""
    study = get(name)
    try:
        record = results.load(published(name))
    except InputError:
        count = len(study.arms)
        return f"Study {name} is not measured yet: `freeze-omni study {name}` trains its {count} arms."
    draw(record)
    longest = max(sum(arm["training_seconds"].values()) for arm in record["arms"]) / 60
    return (
        f"{record['question']} {len(record['arms'])} arms at {record['scale']}, at most {longest:.1f} min of training "
        f"each with {record['threads']} threads of {record['cpu']}, {record['date'][:10]}; `{record['command']}`."
    )


def draw(record: dict[str, Any]) -> list[Any]:
    """Bars for every result and curves for every column of a record; returns their axes."""
    from . import plots

    arms, axes = record["arms"], []
    for label in arms[0]["results"]:
        values = {arm["name"]: arm["results"][label] for arm in arms}
        if None in values.values():
            continue
        axes.append(plots.error_bars(values, label, title_of(label, values, arms)))
        axes[-1].set_xlabel(f"arm of {record['what'].replace('_', ' ', 1)}")
    clock = record["clock"]
    for label in arms[0]["curves"]:
        ends = [arm["curves"][label][clock][-1] for arm in arms]
        last = min(ends) if clock == "seconds" else max(ends)
        series = {arm["name"]: points(arm["curves"][label], clock, last) for arm in arms}
        unit = f"training, up to {last:.0f} s" if clock == "seconds" else clock
        ended = {arm: found[-1][1] for arm, found in series.items() if found}
        lowest = min(ended, key=ended.get)
        title = f"{label}: arm {lowest} ends lowest, at {ended[lowest]:.3g}"
        axes.append(plots.learning_curves(series, unit, label, title))
    return axes


def points(curve: dict[str, list[float]], clock: str, last: float) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(curve[clock], curve["value"], strict=True) if x <= last]


def title_of(label: str, values: dict[str, Any], arms: list[dict[str, Any]]) -> str:
    """The finding: the range and its arms; mean and deviation where only the seed differs."""
    if any(isinstance(value, dict) for value in values.values()):
        return f"{label}, by arm"
    if all(arm["changes"] == arms[0]["changes"] for arm in arms):
        mean, spread = statistics.mean(values.values()), statistics.stdev(values.values())
        return f"{label}: {mean:.3g}, standard deviation {spread:.2g} over {len(arms)} seeds"
    low, high = min(values, key=values.get), max(values, key=values.get)
    return f"{label}: from {values[low]:.3g} ({low}) to {values[high]:.3g} ({high})"
