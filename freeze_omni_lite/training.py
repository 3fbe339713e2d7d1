"""The training loop that every stage shares: steps, schedule, clipping, ranks, resume, frozen parts that stay frozen.

A stage is an nn.Module whose forward(batch) returns a dict of scalars, "loss" among them. Batches are a pure function
`batches(step, rank, world)`, and every random generator is seeded anew from (seed, batch number) before each batch.
So there is no sampler and no random state to keep: an interrupted and resumed run repeats the uninterrupted one.

Ranks come from torchrun through accelerate, which wraps the stage in DistributedDataParallel. The trained parts have
at most half a billion parameters, so each rank holds a whole copy of them and nothing is sharded.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FrozenChanged, InputError, UserError
from .files import atomic_write, atomic_write_text
from .fingerprint import assert_unchanged, digest, fingerprint, hash_tensor
from .ranks import barrier, device, is_main, precision, rank, say, seed_all, start_ranks, world
from .scales import Preset

__all__ = ["History", "barrier", "counts", "device", "digest", "fingerprint", "fit", "freeze", "is_main"]
__all__ += ["learning_rate", "precision", "rank", "say", "seed_all", "show_counts", "start_ranks", "world"]

Batches = Callable[[int, int, int], Any]
RESUME_FILE = "resume.pt"
METRICS_FILE = "metrics.jsonl"
HARMLESS = ("report_every", "save_every")  # settings that may change between an interruption and its resume


# ---- what trains and what does not -----------------------------------------------------------------------------------


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, evaluation mode."""
    return module.requires_grad_(False).eval()


def counts(stage: nn.Module, frozen: dict[str, nn.Module] | None = None) -> list[tuple[str, int, int]]:
    """Rows (part, trained, frozen): parameters of each child of the stage and of each frozen part, each once."""
    frozen = frozen or {}
    cold = {id(parameter) for module in frozen.values() for parameter in module.parameters()}
    seen: set[int] = set()
    rows = []
    own = nn.ParameterDict({name.replace(".", "_"): p for name, p in stage.named_parameters(recurse=False)})
    for name, part in {**frozen, **dict(stage.named_children()), "(its own)": own}.items():
        new = [parameter for parameter in part.parameters() if id(parameter) not in seen]
        seen.update(map(id, new))
        trained = sum(p.numel() for p in new if p.requires_grad and id(p) not in cold)
        rows.append((name, trained, sum(p.numel() for p in new) - trained))
    return [row for row in rows if row[1] or row[2]]


def show_counts(stage: nn.Module, frozen: dict[str, nn.Module] | None = None) -> None:
    """Print how many parameters train and how many stay frozen, part by part."""
    rows = counts(stage, frozen)
    rows.append(("together", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    width = max(len(name) for name, _, _ in rows)
    say(f"{'part':{width}}  {'trained':>13}  {'frozen':>13}")
    for name, trained, cold in rows:
        say(f"{name:{width}}  {trained:>13,}  {cold:>13,}")


def learning_rate(preset: Preset, step: int) -> float:
    """The learning rate of optimiser step `step` (from 0): linear warm-up, then the preset's schedule.

    cosine: down to a tenth at the last step; warmup: inverse square root of the step; constant: as it is.
    """
    number, warmup = step + 1, max(1, preset.warmup_steps)
    if number <= warmup:
        return preset.learning_rate * number / warmup
    if preset.schedule == "warmup":
        return preset.learning_rate * math.sqrt(warmup / number)
    if preset.schedule == "constant":
        return preset.learning_rate
    if preset.schedule != "cosine":
        raise InputError(
            f"schedule is {preset.schedule!r}, expected cosine, warmup or constant: change the preset."
        )
    progress = min(1.0, (number - warmup) / max(1, preset.steps - warmup))
    return preset.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(stage: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """AdamW on the parameters that require gradients; weight decay on matrices only, not on norms and biases."""
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing to train: no parameter of the stage requires gradients")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": preset.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, preset.beta2), fused=True)


# ---- what is written down --------------------------------------------------------------------------------------------


@dataclass
class History:
    """What a run reported: one dict per printed line, and the seconds it trained (all sessions together)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one reported number, for a curve."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


@dataclass
class Window:
    """Sums of the stage's scalars since the last printed line; part of the resume file, so that rows repeat too."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    audio_seconds: float = 0.0
    wall_seconds: float = 0.0

    def add(self, scalars: dict[str, Tensor]) -> None:
        on = scalars["loss"].device
        values = torch.stack(
            [torch.as_tensor(value, device=on).detach().float() for value in scalars.values()]
        )
        for name, value in zip(scalars, values.tolist(), strict=True):  # one transfer for all of them
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over the batches of all ranks, and the audio that all ranks heard per second."""
        from accelerate.utils import gather_object

        windows = [Window(**window) for window in gather_object([vars(self)])]
        names = list(dict.fromkeys(name for window in windows for name in window.sums))
        count = {name: sum(window.counts.get(name, 0) for window in windows) for name in names}
        row = {name: sum(window.sums.get(name, 0.0) for window in windows) / count[name] for name in names}
        audio_seconds = sum(window.audio_seconds for window in windows)
        if audio_seconds:
            row["audio_seconds_per_second"] = audio_seconds / max(self.wall_seconds, 1e-9)
        return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if there is no file; a half-written last line is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def report(row: dict[str, Any], preset: Preset, left_seconds: float) -> None:
    """One line: step, what the stage reported, learning rate, speed, time left."""
    known = ("step", "learning_rate", "audio_seconds_per_second", "seconds")
    scalars = "  ".join(f"{name} {row[name]:.4g}" for name in row if name not in known)
    speed = row.get("audio_seconds_per_second")
    heard = f"  {speed:.0f} audio-s/s" if speed is not None else ""
    minutes, seconds = divmod(round(left_seconds), 60)
    left = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    step = f"{row['step']:>{len(str(preset.steps))}}/{preset.steps}"
    say(f"{preset.stage} {step}  {scalars}  learning rate {row['learning_rate']:.2e}{heard}  {left} left")


# ---- resume ----------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is: optimiser steps done, seconds spent, numbers not yet reported."""

    step: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)


def kept_tensors(stage: nn.Module, frozen: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What training changes: trained parameters and persistent buffers (a moving-average codebook, say)."""
    fixed = {
        id(tensor) for module in frozen.values() for tensor in module.state_dict(keep_vars=True).values()
    }
    fixed |= {id(parameter) for parameter in stage.parameters() if not parameter.requires_grad}
    return {name: t for name, t in stage.state_dict(keep_vars=True).items() if id(t) not in fixed}


def recipe_of(
    preset: Preset, seed: int, batches: Batches, stage: nn.Module, frozen: dict[str, nn.Module], before: dict
) -> dict[str, str]:
    """Everything that makes two runs the same run, as strings by name.

    A `batches` object may carry `.recipe` (a manifest's hash, parents' hashes), which then counts too.
    """
    values = {name: value for name, value in preset.values().items() if name not in HARMLESS}
    kept = kept_tensors(stage, frozen)
    cold = {id(parameter) for module in frozen.values() for parameter in module.parameters()}
    fixed = {name: p for name, p in stage.named_parameters() if name not in kept and id(p) not in cold}
    facts = {
        "stage": f"{preset.stage} at {preset.scale}",
        "seed": seed,
        "batches": getattr(batches, "recipe", ""),
        "shapes of the trained parts": digest(
            {name: str(tuple(tensor.shape)) for name, tensor in kept.items()}
        ),
        "frozen parts": {name: digest(prints) for name, prints in before.items()},
        "parts that do not train": digest(
            {name: hash_tensor(parameter) for name, parameter in fixed.items()}
        ),
    }
    return {name: json.dumps(value, default=str) for name, value in (values | facts).items()}


def save_resume(path: Path, tensors: dict, optimizer: Any, progress: Progress, facts: dict) -> None:
    """Write resume.pt, all or nothing, on rank 0 (ranks hold equal weights, optimiser states and buffers)."""
    if is_main():
        content = {
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
            "optimizer": optimizer.state_dict(),
            "step": progress.step,
            "seconds": progress.seconds,
            "window": vars(progress.window),
            **facts,
        }
        atomic_write(path, lambda partial: torch.save(content, partial))


def load_resume(path: Path, recipe: dict[str, str]) -> dict | None:
    """The content of resume.pt if it belongs to this very run, else None.

    A file of another run is set aside as resume-<hash>.pt with a printed line: nothing is lost, nothing is mixed.
    """
    if not path.is_file():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["recipe"]
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): delete it to train from the start."
        ) from error
    changed = [name for name in sorted(recipe.keys() | theirs.keys()) if recipe.get(name) != theirs.get(name)]
    if not changed:
        return saved
    aside = path.with_name(f"resume-{digest(theirs)[:8]}.pt")
    barrier()  # every rank has read the file before rank 0 moves it
    if is_main():
        path.replace(aside)
    names = ", ".join(changed[:4])
    say(f"{path.name} is of another run ({names} differ): kept as {aside.name}, training from the start.")
    return None


def continue_from(saved: dict, kept: dict[str, Tensor], optimizer: Any, facts: dict) -> Progress:
    """Put a resume file's tensors and optimiser state in place and say so, and what differs from the first session."""
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(saved["tensors"][name])
    optimizer.load_state_dict(saved["optimizer"])
    say(f"resumed after step {saved['step']} ({saved['seconds']:.0f} s of training so far).")
    if saved["first_digest"] != facts["first_digest"]:
        say(
            "note: the first session began from other weights (parts built unseeded, or a parent trained anew)."
        )
        facts["first_digest"] = saved["first_digest"]
    if saved["world"] != facts["world"]:
        say(f"note: {facts['world']} ranks instead of {saved['world']}: from here on the batches differ.")
    return Progress(saved["step"], saved["seconds"], Window(**saved["window"]))


# ---- the loop --------------------------------------------------------------------------------------------------------


def fit(
    stage: nn.Module,
    batches: Batches,
    preset: Preset,
    folder: str | Path,
    *,
    frozen: dict[str, nn.Module] | None = None,
    parts: dict[str, nn.Module] | None = None,
    seed: int = 1,
    resume: bool = True,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> History:
    """Train `stage` for preset.steps optimiser steps and return what it reported.

    stage     forward(batch) -> {"loss": scalar, other scalars to report (detached)}
    batches   batches(step, rank, world) -> batch, a pure function; `step` counts batches, accumulation included.
              If it takes item step * world + rank, then 2 ranks equal 1 rank with doubled accumulation.
              A dict batch may carry "seconds", the audio in it, for the progress line.
    frozen    parts that must stay bit-identical: no gradients, evaluation mode, fingerprinted before and after
    parts     if given, only these modules of the stage train; else every parameter that requires gradients
    evaluate  evaluate(stage) -> scalars, on rank 0 at every resume point and at the end, joins that step's row

    Writes metrics.jsonl and resume.pt into `folder`; stages.save removes the latter. Afterwards the stage is in
    evaluation mode on its device. Raises UserError if the loss stops being finite, and FrozenChanged.
    """
    frozen, folder = frozen or {}, Path(folder)
    select(stage, parts, frozen)
    accelerator = start_ranks()
    for module in frozen.values():
        module.to(accelerator.device)
    model = accelerator.prepare(stage)
    optimizer = accelerator.prepare(make_optimizer(stage, preset))  # after wrapping: it holds what trains
    before = {name: fingerprint(module) for name, module in frozen.items()}

    path, recipe = folder / RESUME_FILE, recipe_of(preset, seed, batches, stage, frozen, before)
    saved = load_resume(path, recipe) if resume else None
    bf16 = use_bf16(accelerator.device, saved)
    facts = {"recipe": recipe, "bf16": bf16, "device": accelerator.device.type, "world": world()}
    kept = kept_tensors(stage, frozen)
    facts["first_digest"] = digest({name: hash_tensor(tensor) for name, tensor in kept.items()})
    progress = continue_from(saved, kept, optimizer, facts) if saved else Progress()
    history = History(start_metrics(folder / METRICS_FILE, progress.step))

    begin, first_step = time.perf_counter(), progress.step
    train_mode(stage, frozen)
    while progress.step < preset.steps:
        step_begin = time.perf_counter()
        rate = learning_rate(preset, progress.step)
        one_step(accelerator, model, optimizer, batches, preset, seed, rate, bf16, progress)
        progress.window.wall_seconds += time.perf_counter() - step_begin
        progress.seconds += time.perf_counter() - step_begin
        last = progress.step == preset.steps
        keep = last or progress.step % preset.save_every == 0
        if last or (keep and evaluate) or progress.step % preset.report_every == 0:
            numbers = evaluated(stage, evaluate, frozen) if keep else {}
            row = {"step": progress.step, **progress.window.means(), **numbers, "learning_rate": rate}
            history.rows.append(row | {"seconds": round(progress.seconds, 3)})
            append_row(folder / METRICS_FILE, history.rows[-1])
            per_step = (time.perf_counter() - begin) / (progress.step - first_step)
            report(history.rows[-1], preset, per_step * (preset.steps - progress.step))
            progress.window = Window()
        if keep:
            save_resume(path, kept_tensors(stage, frozen), optimizer, progress, facts)

    history.seconds = progress.seconds
    stage.eval()
    guard(frozen, before, path)
    barrier()
    return history


def guard(frozen: dict[str, nn.Module], before: dict[str, dict[str, str]], path: Path) -> None:
    """Raise FrozenChanged if a frozen part moved, and delete resume.pt: a second try must not pass unseen."""
    try:
        for name, module in frozen.items():
            assert_unchanged(before[name], fingerprint(module), f"the frozen part {name!r}")
    except FrozenChanged:
        path.unlink(missing_ok=True)
        raise


def one_step(accelerator, model, optimizer, batches, preset, seed, rate, bf16, progress: Progress) -> None:
    """One optimiser step over preset.accumulate batches of this rank. Raises UserError if it is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for turn in range(preset.accumulate):
        number = progress.step * preset.accumulate + turn
        seed_all(seed, number * world() + rank())
        batch = to_device(batches(number, rank(), world()), accelerator.device)
        last = turn == preset.accumulate - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                scalars = model(batch)
            accelerator.backward(scalars["loss"] / preset.accumulate)
        progress.window.add(scalars)
        progress.window.audio_seconds += audio_seconds(batch)
        check_finite("loss", scalars["loss"], progress.step, preset)
    norm = accelerator.clip_grad_norm_(model.parameters(), preset.clip_norm)
    check_finite("gradient norm", norm, progress.step, preset)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1


def check_finite(what: str, value: Tensor, step: int, preset: Preset) -> None:
    number = value.item()
    if not math.isfinite(number):
        raise UserError(
            f"the {what} is {number} at step {step + 1} of stage {preset.stage!r}, expected a finite number: "
            f"lower learning_rate (now {preset.learning_rate:g}) or clip_norm (now {preset.clip_norm:g})."
        )


def select(stage: nn.Module, parts: dict[str, nn.Module] | None, frozen: dict[str, nn.Module]) -> None:
    """Set which parameters require gradients."""
    if parts is not None:
        stage.requires_grad_(False)
        for module in parts.values():
            module.requires_grad_(True)
    for module in frozen.values():
        freeze(module)


def train_mode(stage: nn.Module, frozen: dict[str, nn.Module]) -> None:
    stage.train()
    for module in frozen.values():
        module.eval()


def evaluated(stage: nn.Module, evaluate: Callable | None, frozen: dict[str, nn.Module]) -> dict[str, float]:
    """The caller's own measurement, in evaluation mode; other ranks wait at their next step."""
    if evaluate is None or not is_main():
        return {}
    stage.eval()
    with torch.no_grad():
        numbers = evaluate(stage)
    train_mode(stage, frozen)
    return {name: float(value) for name, value in numbers.items()}


def use_bf16(on: torch.device, saved: dict | None) -> bool:
    """All ranks as rank 0 decides; a resumed run on the same kind of device stays with what it had."""
    from accelerate.utils import broadcast_object_list

    if saved and saved["device"] == on.type:
        return saved["bf16"]
    return broadcast_object_list([precision(on) == "bf16"])[0]


def to_device(batch: Any, on: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, on)


def audio_seconds(batch: Any) -> float:
    """The seconds of audio that a batch says it holds; 0 if it says nothing."""
    value = batch.get("seconds", 0.0) if isinstance(batch, dict) else getattr(batch, "seconds", 0.0)
    return float(torch.as_tensor(value, dtype=torch.float64).sum())


def start_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl back to the rows up to `step` and return them."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    barrier()  # every rank has read before rank 0 rewrites
    if is_main():
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    if is_main():
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
