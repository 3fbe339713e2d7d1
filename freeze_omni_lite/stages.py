"""Stage folders, the hand-over between notebooks: runs/<scale>/<stage>[@variant]/{weights.safetensors, stage.json}.

Weights carry the name of their part in front ("encoder.", "adapter."); stage.json says where they come from: preset,
seed, parents by the hash of their weights, commit, metrics. Loading is strict both ways and refuses mixed chains.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import __version__, scales
from .errors import StageMismatch, StageMissing
from .files import atomic_write, atomic_write_json, sha256_of
from .ranks import barrier, device, is_main, say, world
from .threads import thread_count
from .training import RESUME_FILE

WEIGHTS_FILE = "weights.safetensors"
RECORD_FILE = "stage.json"
SHIPPED = "data_samples/stages"
NOTEBOOK_OF = {
    "codec": "01",
    "encoder_ctc": "02",
    "encoder_adapter": "03",
    "encoder_prompt": "04",
    "speech_tokens": "05",
    "decoder_nar_ar": "06",
    "decoder_prefix": "07",
    "duplex": "08",
}


# ---- places ----------------------------------------------------------------------------------------------------------


def root() -> Path:
    """The repository root if the package lies in a checkout (notebooks/ beside it), else the current directory."""
    above = Path(__file__).resolve().parents[1]
    return above if (above / "notebooks").is_dir() else Path.cwd()


def folder(stage: str, scale: str, runs: str | Path = "runs", variant: str = "") -> Path:
    """runs/<scale>/<stage>[@variant]; a relative `runs` starts at the repository root."""
    return root() / runs / scale / full_name(stage, variant)


def full_name(stage: str, variant: str = "") -> str:
    return f"{stage}@{variant}" if variant else stage


def shown(path: Path) -> str:
    """A path as people say it: relative to the repository root, or the last three names of one elsewhere."""
    base = root()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else "/".join(path.parts[-3:])


def missing(stage: str, scale: str, place: Path) -> StageMissing:
    number = NOTEBOOK_OF.get(stage, "")
    return StageMissing(
        f"stage {stage!r} at scale {scale!r} not found in {shown(place)}. "
        f"Run notebook {number} first, or `freeze-omni run {number} --scale {scale}`."
    )


# ---- one stage -------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A trained stage on disk: what stage.json says about it, and its weights when a module asks for them."""

    folder: Path
    record: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return self.record["stage"]

    @property
    def scale(self) -> str:
        return self.record["scale"]

    @property
    def variant(self) -> str:
        return self.record["variant"]

    @property
    def full_name(self) -> str:
        return full_name(self.name, self.variant)

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record["metrics"]

    @property
    def extra(self) -> dict[str, Any]:
        return self.record["extra"]

    @cached_property
    def files(self) -> list[Path]:
        """weights.safetensors, or all of weights-00001-of-0000N.safetensors. Raises StageMismatch if one lacks."""
        single = self.folder / WEIGHTS_FILE
        shards = [single] if single.is_file() else sorted(self.folder.glob("weights-*-of-*.safetensors"))
        wanted = 1 if single.is_file() else int(shards[0].stem.rsplit("-", 1)[1]) if shards else 1
        if len(shards) != wanted:
            raise StageMismatch(
                f"{shown(self.folder)} holds {len(shards)} of {wanted} weight files: copy the whole folder again."
            )
        return shards

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights as they are now: the file's own, or that of all shards' hashes in order."""
        hashes = [sha256_of(path) for path in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def preset(self) -> scales.Preset:
        """The settings it was trained with, whatever scales.py says today.

        Saved values win. A setting that scales.py has gained since takes today's value; one that it has lost is kept.
        """
        today = scales.load(self.name, self.scale).values()
        saved = self.record["preset"]
        changes = {name: value for name, value in saved.items() if name not in today or today[name] != value}
        return scales.Preset(self.name, self.scale, changes)

    @property
    def provenance(self) -> str:
        """One line: what, when, from where."""
        facts = self.record
        commit = f", commit {facts['commit'][:8]}" if facts.get("commit") else ""
        return (
            f"{self.full_name} at {self.scale}: seed {facts['seed']}, {facts['seconds']:.0f} s on {facts['device']}, "
            f"{facts['date'][:10]}{commit}, weights {self.sha256[:8]}, from {shown(self.folder)}"
        )

    def restore(self, **modules: nn.Module) -> "Stage":
        """Fill each module from the weights saved under its part name; half precision becomes the module's own.

        Strict both ways; all names and shapes are compared before anything is copied. Raises StageMismatch.
        """
        parts = {name: self.tensors(name) for name in modules}
        for name, module in modules.items():
            self.compare(name, module.state_dict(), parts[name])
        for name, module in modules.items():
            module.load_state_dict(parts[name])
        return self

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The saved tensors of one part, without its name in front."""
        found = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
                    if key.startswith(f"{part}."):
                        found[key.removeprefix(f"{part}.")] = file.get_tensor(key)
        return found

    def compare(self, part: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Raise StageMismatch naming the first tensor whose name or shape differs."""
        for name in sorted(expected.keys() | found.keys()):
            want, have = (shape_of(tensors.get(name)) for tensors in (expected, found))
            if want != have:
                number = NOTEBOOK_OF.get(self.name, "")
                raise StageMismatch(
                    f"{shown(self.folder)} does not fit: tensor {part}.{name} is {have} there, expected {want}. "
                    f"Build the part from the stage's own preset, or train it again with notebook {number}."
                )

    def check_parents(self, *parents: "Stage") -> "Stage":
        """Raise StageMismatch unless each given stage has the very weights that this one was trained on."""
        for parent in parents:
            trained_on = self.record["parents"].get(parent.full_name)
            if trained_on != parent.sha256:
                which = f"weights {trained_on[:8]}" if trained_on else "other stages"
                raise StageMismatch(
                    f"{self.full_name} in {shown(self.folder)} was trained on {which} of {parent.full_name}, but "
                    f"{shown(parent.folder)} holds weights {parent.sha256[:8]}. Train {self.name} again: "
                    f"`freeze-omni run {NOTEBOOK_OF.get(self.name, '')} --scale {self.scale}`."
                )
        return self


def shape_of(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)}"


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(
    stage: str,
    preset: scales.Preset,
    modules: dict[str, nn.Module],
    *,
    runs: str | Path = "runs",
    variant: str = "",
    seed: int = 1,
    parents: Sequence[Stage] = (),
    metrics: dict[str, Any] | None = None,
    seconds: float = 0.0,
    extra: dict[str, Any] | None = None,
    source_hash: str | None = None,
) -> Stage:
    """Write a stage folder on rank 0, each file whole or not at all, stage.json last; remove resume.pt.

    modules      part name -> module; its state becomes "<part>.<name>" in weights.safetensors
    parents      the stages whose weights were loaded
    metrics      numbers of the check cell: finite (AssertionError else), nested dicts and strings allowed
    extra        whatever loading needs beside the preset, such as CTC units; must fit into JSON
    source_hash  of the notebook; the runner passes it in FREEZE_OMNI_SOURCE_HASH
    """
    assert preset.stage == stage, f"preset of {preset.stage!r} given for stage {stage!r}"
    place = folder(stage, preset.scale, runs, variant)
    metrics = plain(metrics or {})
    if is_main():
        record = {
            "stage": stage,
            "scale": preset.scale,
            "variant": variant,
            "preset": preset.values(),
            "changes": preset.changes,
            "seed": seed,
            "parents": {parent.full_name: parent.sha256 for parent in parents},
            "metrics": metrics,
            "seconds": round(float(seconds), 3),
            "extra": extra or {},
            "source_hash": source_hash or os.environ.get("FREEZE_OMNI_SOURCE_HASH"),
            **circumstances(),
        }
        json.dumps(record, allow_nan=False)  # fails here, before anything is written
        write(place, weights_of(modules), record)
    barrier()
    return read(place, stage, preset.scale)


def plain(value: Any) -> Any:
    """Metrics as JSON can hold them; asserts that every number is finite."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    assert math.isfinite(number), f"a metric is {number}, expected a finite number"
    return number


def weights_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor of every part, on the CPU and with memory of its own (safetensors refuses shared memory)."""
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def write(place: Path, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Weights, then stage.json with their hash: a crash in between is noticed when the stage is read."""
    path = atomic_write(
        place / WEIGHTS_FILE, lambda partial: save_file(weights, partial, metadata={"format": "pt"})
    )
    atomic_write_json(place / RECORD_FILE, record | {"weights_sha256": sha256_of(path)})
    (place / RESUME_FILE).unlink(missing_ok=True)


def circumstances() -> dict[str, Any]:
    """Where and with what a stage was made; no names of machines, people or folders."""
    return {
        "commit": commit(),
        "library_version": __version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "device": device_name(),
        "threads": thread_count(),
        "ranks": world(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name() -> str:
    on = device()
    return torch.cuda.get_device_name(on) if on.type == "cuda" else on.type


def commit() -> str | None:
    """The git commit of the checkout, "+" behind it if files differ; None outside of one."""
    try:
        ask = ["git", "-C", str(root())]
        found = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changed = subprocess.run(
            [*ask, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


# ---- loading ---------------------------------------------------------------------------------------------------------


def read(place: Path, stage: str, scale: str) -> Stage:
    """The stage in a folder. Raises StageMissing, or StageMismatch if the folder holds something else or is torn."""
    if not (place / RECORD_FILE).is_file():
        raise missing(stage, scale, place.parent)
    try:
        record = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
        found = Stage(place, record)
        what, sealed = (found.name, found.scale), record["weights_sha256"]
        record["preset"], record["parents"], record["metrics"], record["extra"], record["variant"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageMismatch(
            f"{shown(place)}/{RECORD_FILE} is damaged ({error!r}): train the stage again."
        ) from None
    if what != (stage, scale):
        raise StageMismatch(
            f"{shown(place)} holds stage {what[0]!r} at scale {what[1]!r}, expected {stage!r} at {scale!r}: "
            "put the folder back under its own name, or train this one."
        )
    if not found.files or found.sha256 != sealed:
        raise StageMismatch(
            f"the weights in {shown(place)} are not those that {RECORD_FILE} describes (an interrupted save?): "
            f"run `freeze-omni run {NOTEBOOK_OF.get(stage, '')} --scale {scale}` again."
        )
    return found


def load(stage: str, scale: str, runs: str | Path = "runs", variant: str = "", quiet: bool = False) -> Stage:
    """The stage at `scale` in `runs`, else the one shipped with the repository; prints its line of provenance.

    Raises StageMissing (with the command that trains it), StageMismatch, or InputError for an unknown name.
    """
    scales.check(stage, scales.STAGES, "stage")
    scales.check(scale, scales.SCALES, "scale")
    place, shipped = folder(stage, scale, runs, variant), root() / SHIPPED / scale / stage
    use_shipped = not variant and not (place / RECORD_FILE).is_file() and (shipped / RECORD_FILE).is_file()
    found = read(shipped if use_shipped else place, stage, scale)
    if not quiet:
        say(found.provenance)
    return found


def own_variant(stage: str, scale: str, runs: str | Path, variant: str) -> str:
    """Which `stage` a child of `variant` grows from: that of its own variant if there is one, else the plain one."""
    return variant if variant and (folder(stage, scale, runs, variant) / RECORD_FILE).is_file() else ""


def check_same_chain(found: Stage, others: Sequence[Stage]) -> None:
    """Raise StageMismatch if a child that is a variant, or whose parent is, was not trained on the very parent here."""
    for other in others:
        if other.variant or found.variant:
            for child, parent in ((found, other), (other, found)):
                if parent.name in {name.partition("@")[0] for name in child.record["parents"]}:
                    child.check_parents(parent)


@dataclass
class Source:
    """One place that holds all the stages somebody needs, so that no chain mixes scales."""

    place: Path
    scale: str
    needs: tuple[str, ...]
    loaded: dict[str, Stage] = field(default_factory=dict, repr=False)

    def stage(self, name: str) -> Stage:
        """Read once; its parents are compared with the stages of this place that are read already."""
        if name not in self.loaded:
            found = read(self.place / name, name, self.scale)
            for other in self.loaded.values():
                if other.full_name in found.record["parents"]:
                    found.check_parents(other)
                if found.full_name in other.record["parents"]:
                    other.check_parents(found)
            self.loaded[name] = found
        return self.loaded[name]

    def presets(self) -> Iterator[scales.Preset]:
        return (self.stage(name).preset for name in self.needs)

    def provenance(self) -> dict[str, dict[str, str]]:
        """For a trace: each stage that was used, its scale, folder and weights."""
        return {
            name: {"scale": stage.scale, "folder": shown(stage.folder), "weights": stage.sha256[:16]}
            for name, stage in self.loaded.items()
        }


def source(needs: Sequence[str], runs: str | Path = "runs", scale: str | None = None) -> Source:
    """The first place that holds all of `needs`: runs/laptop, the shipped laptop stages, runs/tiny; or `scale` only.

    Says on standard error which one it takes. Raises StageMissing naming what the best place lacks.
    """
    if scale is not None:
        scales.check(scale, scales.SCALES, "scale")
    base, order = root(), [scale] if scale else ["laptop", "tiny"]
    places = [(top / name, name) for name in order for top in (base / runs, base / SHIPPED)]
    places = [(place, name) for place, name in places if place.parent != base / SHIPPED or place.is_dir()]
    lacking = [[need for need in needs if not (place / need / RECORD_FILE).is_file()] for place, _ in places]
    best = min(range(len(places)), key=lambda number: len(lacking[number]))  # the first among equals
    place, name = places[best]
    if lacking[best]:
        raise missing(lacking[best][0], name, place)
    if is_main():
        print(f"stages from {shown(place)}", file=sys.stderr)
    return Source(place, name, tuple(needs))


def find(stage: str, runs: str | Path = "runs", scale: str | None = None) -> Stage:
    """The best there is of one stage (see `source`)."""
    return source([stage], runs, scale).stage(stage)
