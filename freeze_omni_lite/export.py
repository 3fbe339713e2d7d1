"""`freeze-omni export`: a chain of trained stages becomes the shipped one, small enough for the repository.

Half precision is for what is large: matrices and convolution kernels. Everything else stays as it was trained (see
`exported_dtype`). Parents are known by their hashes and exported weights have new ones, so they are hashed again in
course order; `exported.from` in stage.json keeps the hash of the weights that the stage came from.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__, ranks, scales, stages
from .errors import InputError, StageMismatch, StageMissing
from .files import atomic_write_json
from .parts import only_one
from .stages import RECORD_FILE, SHIPPED, WEIGHTS_FILE, Stage

MB = 1_000_000
SHARD_BYTES = 15 * MB  # of one file
CHAIN_BYTES = 90 * MB  # of all shipped stages together
HEADER_BYTES = 256  # of one tensor in a safetensors header, with its name; generous
LARGEST_ERROR = 1e-3  # relative; rounding to fp16 costs at most half of it
FULL_PRECISION = ("codebook", "normalization")  # what indexes or normalises; small beside the matrices


@dataclass
class Row:
    """One exported stage: size and number of its weight files, tensors in fp16 and all, largest relative error."""

    stage: str
    nbytes: int
    files: int
    halved: int
    tensors: int
    error: float

    def show(self) -> str:
        return (
            f"{self.stage:<16}{self.nbytes / MB:8.2f} MB{self.files:4d} file{' ' if self.files == 1 else 's'}"
            f"{self.halved:5d} of {self.tensors} tensors fp16, largest relative error {self.error:.1e}"
        )


# ---- the verb --------------------------------------------------------------------------------------------------------


def export(
    scale: str = "laptop",
    runs: str | Path = "runs",
    names: Sequence[str] = (),
    to: str | Path | None = None,
    device: str | None = None,
) -> list[Row]:
    """Write the shipped form of trained stages and print a line for each.

    names   stages, or stage@variant, which is shipped under its plain name; all of runs/<scale> if empty
    to      the folder of the shipped stages; data_samples/stages/<scale> if None; relative to the repository root
    device  only checked: rounding is done on the CPU

    All are built and checked in a folder beside `to` before the first one is replaced. Raises StageMissing,
    StageMismatch or InputError and leaves `to` as it was.
    """
    scales.check(scale, scales.SCALES, "scale")
    ranks.device(device)
    base = stages.root()
    target = base / (to if to is not None else Path(SHIPPED) / scale)
    chain = chosen(names, scale, base / runs / scale)
    with workplace(target) as work:
        for stage in chain:
            check_place(target / stage.name)
        built: dict[str, Stage] = {}
        rows = []
        for stage in chain:
            record = record_of(stage, parents_of(stage, built, target))
            built[stage.name], row = convert(stage, record, work / "new" / stage.name)
            rows.append(row)
        check_children(built, target)
        check_sizes(built, target)
        swap(work, target, list(built))
    for row in rows:
        print(row.show())
    print(f"{sum(row.nbytes for row in rows) / MB:.2f} MB in {stages.shown(target)}")
    return rows


def chosen(names: Sequence[str], scale: str, folder: Path) -> list[Stage]:
    """The stages to export, read from `folder`, in course order."""
    order = list(stages.NOTEBOOK_OF)
    names = list(names) or [name for name in order if (folder / name / RECORD_FILE).is_file()]
    plain = [name.partition("@")[0] for name in names]
    for name in plain:
        scales.check(name, scales.STAGES, "stage")
        if plain.count(name) > 1:
            raise InputError(f"--stages names {name} twice: a stage is shipped once, leave one of them out.")
    if not names:
        raise stages.missing(order[0], scale, folder)
    by_course = sorted(zip(plain, names, strict=True), key=lambda pair: order.index(pair[0]))
    return [stages.read(folder / name, stage, scale) for stage, name in by_course]


# ---- one stage -------------------------------------------------------------------------------------------------------


def convert(stage: Stage, record: dict[str, Any], place: Path) -> tuple[Stage, Row]:
    """Write one stage to `place`, read it back strictly and compare every tensor with the original."""
    weights = {name: tensor.to(exported_dtype(name, tensor)) for name, tensor in tensors_of(stage)}
    halved = sum(tensor.dtype == torch.float16 for tensor in weights.values())
    write(place, weights, record)
    exported = stages.read(place, stage.name, stage.scale)
    error = compared(stage, exported)
    return exported, Row(stage.name, size_of(place), len(exported.files), halved, len(weights), error)


def exported_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """The precision in which a tensor is shipped.

    fp16 for floating tensors of two or more dimensions. Their own: integers and flags; vectors and scalars (biases,
    norms, the CTC blank, statistics); whatever belongs to a codebook or a normalisation; and a tensor that fp16 cannot
    hold within LARGEST_ERROR, since it overflows or vanishes. Raises StageMismatch for NaN and infinity.
    """
    if not tensor.is_floating_point():
        return tensor.dtype
    if not bool(tensor.isfinite().all()):
        raise StageMismatch(
            f"tensor {name} holds NaN or infinity, expected finite weights: train its stage again."
        )
    if tensor.dim() < 2 or set(name.split(".")) & set(FULL_PRECISION):
        return tensor.dtype
    return torch.float16 if relative_error(tensor, tensor.half()) <= LARGEST_ERROR else tensor.dtype


def relative_error(original: Tensor, exported: Tensor) -> float:
    """Largest difference, as a share of the original's largest magnitude; 0 for tensors without any number but 0."""
    if not original.numel():
        return 0.0
    before, after = original.double(), exported.double()
    largest, difference = float(before.abs().max()), float((before - after).abs().max())
    return difference / largest if difference else 0.0


def parts_of(stage: Stage) -> list[str]:
    """The names in front of the stage's tensors: encoder, ctc_head, ..."""
    found = set()
    for path in stage.files:
        with safe_open(path, framework="pt") as file:
            found |= {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    return sorted(found)


def tensors_of(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """Every saved tensor by its full name, in the order of names."""
    for part in parts_of(stage):
        for name, tensor in sorted(stage.tensors(part).items()):
            yield f"{part}.{name}", tensor


def compared(original: Stage, exported: Stage) -> float:
    """The largest relative error of all tensors. Raises StageMismatch where a name or shape differs."""
    largest = 0.0
    for part in sorted({*parts_of(original), *parts_of(exported)}):
        before, after = original.tensors(part), exported.tensors(part)
        exported.compare(part, before, after)
        largest = max([largest, *(relative_error(before[name], after[name]) for name in before)])
    assert largest <= LARGEST_ERROR, f"{exported.name} lost {largest:.1e} of its weights while written"
    return largest


def write(place: Path, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
    """The weights in shards, then stage.json with their hash."""
    place.mkdir(parents=True)
    shards = packed(weights)
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_FILE if len(shards) == 1 else f"weights-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: tensor.contiguous().clone() for key, tensor in shard.items()}
        save_file(tensors, place / name, metadata={"format": "pt"})
        assert (place / name).stat().st_size <= SHARD_BYTES, f"{name} came out over {SHARD_BYTES} bytes"
    atomic_write_json(place / RECORD_FILE, record | {"weights_sha256": Stage(place, record).sha256})


def packed(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Neighbours together, as many as fit into SHARD_BYTES. Raises InputError for a tensor that fits into none."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = HEADER_BYTES
    for name, tensor in weights.items():
        nbytes = tensor.nbytes + HEADER_BYTES
        if HEADER_BYTES + nbytes > SHARD_BYTES:
            raise InputError(
                f"tensor {name} takes {nbytes / MB:.1f} MB, expected at most {SHARD_BYTES / MB:.1f} MB, the size of a "
                "shard: ship a smaller scale."
            )
        if filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = HEADER_BYTES
        shards[-1][name] = tensor
        filled += nbytes
    return shards


def record_of(stage: Stage, parents: dict[str, str]) -> dict[str, Any]:
    """stage.json of the exported stage: the original's, with new parents and where the weights come from."""
    exported = {
        "from": stage.sha256,
        "variant": stage.variant,
        "dtype": "float16",
        "library_version": __version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return stage.record | {"variant": "", "parents": parents, "exported": exported}


# ---- the chain -------------------------------------------------------------------------------------------------------


def parents_of(stage: Stage, built: dict[str, Stage], target: Path) -> dict[str, str]:
    """The hashes of the exported parents: those of this export, else those that are in `target` already.

    Raises StageMissing or StageMismatch unless each came from the very weights that the stage was trained on.
    """
    hashes = {}
    for full_name, trained_on in stage.record["parents"].items():
        name = full_name.partition("@")[0]
        if name not in built and not (target / name / RECORD_FILE).is_file():
            raise StageMissing(
                f"{stage.name} was trained on {full_name}, which is neither exported with it nor in "
                f"{stages.shown(target)}: name {full_name} in --stages too."
            )
        parent = built.get(name) or stages.read(target / name, name, stage.scale)
        origin = parent.record.get("exported", {}).get("from")
        if trained_on not in (parent.sha256, origin):
            raise StageMismatch(
                f"{stage.full_name} was trained on weights {trained_on[:8]} of {full_name}, but the exported {name} "
                f"comes from weights {(origin or parent.sha256)[:8]}: name the right one in --stages too, or train "
                f"{stage.name} again."
            )
        hashes[name] = parent.sha256
    return hashes


def check_children(built: dict[str, Stage], target: Path) -> None:
    """Raise StageMismatch if a stage that stays in `target` would lose a parent that this export replaces."""
    for name in stages.NOTEBOOK_OF:
        if name in built or not (target / name / RECORD_FILE).is_file():
            continue
        child = stages.read(target / name, name, next(iter(built.values())).scale)
        for parent, shipped_with in child.record["parents"].items():
            if parent in built and built[parent].sha256 != shipped_with:
                raise StageMismatch(
                    f"{name} in {stages.shown(target)} belongs to another {parent} (weights {shipped_with[:8]}), "
                    f"which this export would replace: name {name} in --stages too, or remove it there."
                )


def check_sizes(built: dict[str, Stage], target: Path) -> None:
    """Raise InputError naming the sizes if all stages that `target` would hold take more than CHAIN_BYTES."""
    places = {path.parent.name: path.parent for path in sorted(target.glob(f"*/{RECORD_FILE}"))}
    places |= {name: stage.folder for name, stage in built.items()}
    sizes = {name: size_of(place) for name, place in places.items()}
    if sum(sizes.values()) > CHAIN_BYTES:
        each = ", ".join(f"{name} {size / MB:.1f}" for name, size in sizes.items())
        raise InputError(
            f"the shipped stages would take {sum(sizes.values()) / MB:.1f} MB ({each}), expected at most "
            f"{CHAIN_BYTES / MB:.1f} MB together: leave stages out, or train smaller ones."
        )


def size_of(place: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def check_place(place: Path) -> None:
    """Raise InputError if `place` holds anything but an export, whole or torn: trained stages are not overwritten."""
    try:
        ours = not place.exists() or "exported" in json.loads((place / RECORD_FILE).read_text("utf-8"))
    except (FileNotFoundError, ValueError, TypeError):
        ours = False
    if not ours:
        raise InputError(
            f"{stages.shown(place)} would be overwritten, expected an exported stage there or nothing: choose another "
            "--to, or remove it."
        )


# ---- all or nothing --------------------------------------------------------------------------------------------------


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A folder beside `target`, one export at a time; what a broken-off swap left is undone before and after."""
    work = target.with_name(f".{target.name}.export.partial")
    try:
        with only_one("export"):
            clean(work, target)
            try:
                (work / "new").mkdir(parents=True)
                yield work
            finally:
                clean(work, target)
    except OSError as error:
        raise InputError(
            f"{stages.shown(target)} cannot be written ({error.strerror or error}): choose a folder that you may "
            "write, with space left."
        ) from error


def swap(work: Path, target: Path, names: Sequence[str]) -> None:
    """Stage by stage, the old one out and the new one in; the last rename says that it is done."""
    target.mkdir(parents=True, exist_ok=True)
    (work / "old").mkdir()
    for name in names:
        if (target / name).exists():
            (target / name).rename(work / "old" / name)
        else:
            (work / "old" / name).mkdir()  # empty: on the way back, nothing takes its place
        (work / "new" / name).rename(target / name)
    (work / "old").rename(work / "replaced")


def clean(work: Path, target: Path) -> None:
    """Put every stage of an unfinished swap back, then remove the folder."""
    for kept in sorted((work / "old").glob("*")):
        if (target / kept.name).exists():
            shutil.rmtree(target / kept.name)
        if any(kept.iterdir()):
            kept.rename(target / kept.name)
        else:
            kept.rmdir()
    if work.exists():
        shutil.rmtree(work)
