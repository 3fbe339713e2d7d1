"""What the first code cell of a notebook calls: the preset, the stage's folder, and short ways to load and save.

Sugar over scales.py and stages.py, nothing more: what trains, and how, stands in the notebook.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from . import plots, scales, stages
from .errors import InputError
from .ranks import say
from .scales import Preset
from .stages import Stage


@dataclass(frozen=True)
class Context:
    """Where a notebook stands: its preset (None if it trains no stage), seed, runs, variant and folder."""

    scale: str
    preset: Preset | None
    seed: int
    runs: str
    variant: str
    folder: Path  # of the stage, or of the whole scale if the notebook trains none
    loaded: list[Stage] = field(default_factory=list, repr=False, compare=False)

    def load(self, stage: str, variant: str | None = None) -> Stage:
        """A parent at the same scale; prints where it comes from. Raises StageMissing or StageMismatch.

        variant   None: the notebook's own if the parent was trained as such, else the plain one, which is said
        """
        if variant is None:
            variant = stages.own_variant(stage, self.scale, self.runs, self.variant)
            if variant != self.variant:
                say(f"no {stages.full_name(stage, self.variant)}: this variant grows from the plain {stage}")
        found = stages.load(stage, self.scale, self.runs, variant)
        stages.check_same_chain(found, self.loaded)
        self.loaded.append(found)
        return found

    def save(
        self,
        modules: dict[str, nn.Module],
        *,
        parents: Sequence[Stage] = (),
        metrics: dict[str, Any] | None = None,
        seconds: float = 0.0,
        extra: dict[str, Any] | None = None,
    ) -> Stage:
        """Hand the trained modules over, by part name, with the parents whose weights were loaded."""
        assert self.preset is not None, "a notebook without a stage has nothing to save"
        return stages.save(
            self.preset.stage,
            self.preset,
            modules,
            runs=self.runs,
            variant=self.variant,
            seed=self.seed,
            parents=parents,
            metrics=metrics,
            seconds=seconds,
            extra=extra,
        )


def start(
    scale: str, changes: dict[str, Any], seed: int, runs: str, variant: str = "", *, stage: str | None = None
) -> Context:
    """Check the parameters, set the look of the figures and tell where the results go.

    stage   the stage that this notebook trains; None: none, and `changes` must be empty

    Raises InputError for an unknown scale or field, and if the library comes from another place than this checkout.
    """
    check_checkout(Path.cwd(), Path(__file__).resolve().parent)
    scales.check(scale, scales.SCALES, "scale")
    if changes and stage is None:
        raise InputError(
            f"CHANGES is {changes!r}, but this notebook trains no stage: expected an empty dict, leave it so."
        )
    plots.style()
    preset = scales.load(stage, scale, **changes) if stage else None
    folder = stages.folder(stage, scale, runs, variant) if stage else stages.root() / runs / scale
    changed = "".join(f", {name} = {value!r}" for name, value in changes.items())
    say(f"scale {scale}, seed {seed}{changed}, results in {stages.shown(folder)}")
    return Context(scale, preset, seed, runs, variant, folder)


def check_checkout(working_folder: Path, package: Path) -> None:
    """Raise InputError if `working_folder` lies in a checkout of this repository whose package is not `package`."""
    for place in (working_folder, *working_folder.parents):
        here = place / "freeze_omni_lite"
        if (here / "notebook.py").is_file() and (place / "notebooks").is_dir():
            if not here.samefile(package):
                raise InputError(
                    f"freeze_omni_lite was imported from {package}, expected {here}: run `make set-up` in {place} "
                    "and choose the kernel of its .venv."
                )
            return
