"""The course as a list of notebooks: which there are, what each is given, and whether it has run already.

Everything that can be wrong with a request is refused here, before the first kernel starts.
"""

import ast
import functools
import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, scales
from .errors import InputError, UserError
from .files import atomic_write_json, sha256_of

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = ("SCALE", "CHANGES", "SEED", "RUNS", "VARIANT")
RUN_FILE = "run.json"

# notebook -> the stage it trains ("" if none) and its default share of the whole course's time
COURSE = {
    "00_map_of_the_paper": ("", 3),
    "01_speech_codec": ("codec", 14),
    "02_encoder_stage1_ctc": ("encoder_ctc", 14),
    "03_encoder_stage2_adapter": ("encoder_adapter", 14),
    "04_encoder_stage3_prompt": ("encoder_prompt", 10),
    "05_decoder_stage1_speech_tokens": ("speech_tokens", 8),
    "06_decoder_stage2_nar_ar": ("decoder_nar_ar", 12),
    "07_decoder_stage3_prefix": ("decoder_prefix", 8),
    "08_duplex_labels": ("duplex", 8),
    "09_evaluation": ("", 6),
    "10_live_dialogue": ("", 4),
    "11_llama_omni": ("", 3),
    "12_full_scale": ("", 4),
}


# ---- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notebook:
    """One notebook of the course."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.name.split("_")[0]

    @property
    def stage(self) -> str:
        return COURSE.get(self.name, ("", 0))[0]

    @property
    def share(self) -> float:
        return COURSE.get(self.name, ("", 5))[1]

    @functools.cached_property
    def cells(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.path} is no notebook ({error}): restore it from the repository."
            ) from None

    @property
    def title(self) -> str:
        """The first heading, else the file's name."""
        text = "\n".join("".join(cell["source"]) for cell in self.cells if cell["cell_type"] == "markdown")
        heading = re.search(r"^# +(.+)$", text, re.MULTILINE)
        return re.sub(r"^\d+\W+", "", heading[1].strip()) if heading else self.name

    @property
    def source_hash(self) -> str:
        """sha256 of the code cells: mending a sentence of the prose asks for no new training."""
        code = ["".join(cell["source"]) for cell in self.cells if cell["cell_type"] == "code"]
        return hashlib.sha256(json.dumps(code).encode()).hexdigest()


@dataclass(frozen=True)
class Settings:
    """What every notebook of one run is given; `changes` by stage."""

    scale: str
    changes: dict[str, dict[str, Any]]
    seed: int = 1
    runs: str = "runs"
    variant: str = ""

    def parameters(self, notebook: Notebook) -> dict[str, Any]:
        values = (self.scale, self.changes.get(notebook.stage, {}), self.seed, self.runs, self.variant)
        return dict(zip(PARAMETERS, values, strict=True))

    @property
    def root(self) -> Path:
        """The folder of this scale; relative RUNS start at the repository root."""
        return ROOT / self.runs / self.scale

    def folder(self, notebook: Notebook) -> Path:
        name = notebook.stage or notebook.name
        return self.root / (f"{name}@{self.variant}" if self.variant else name)

    def facts(self, notebook: Notebook) -> dict[str, Any]:
        """What a finished run must agree with to be kept by --resume."""
        stage = notebook.stage
        changes = self.changes.get(stage, {})
        return {
            "stage": stage,
            "scale": self.scale,
            "variant": self.variant,
            "changes": changes,
            "preset": scales.load(stage, self.scale, **changes).values() if stage else {},
            "seed": self.seed,
            "library_version": __version__,
            "source_hash": notebook.source_hash,
        }


def course(folder: Path = NOTEBOOKS) -> list[Notebook]:
    """The numbered notebooks of a folder, in order. Raises InputError if there are none."""
    found = [Notebook(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if not found:
        raise InputError(f"no notebooks in {folder}: run this from a checkout of the repository.")
    return found


def select(wanted: list[str], folder: Path = NOTEBOOKS) -> list[Notebook]:
    """Notebooks by number, name, or "all", in course order. Raises InputError for an unknown one."""
    known = course(folder)
    if wanted == ["all"]:
        return known
    names = {
        alias: book for book in known for alias in (book.number, book.number.lstrip("0") or "0", book.name)
    }
    for word in wanted:
        if word not in names:
            choices = ", ".join(book.number for book in known)
            raise InputError(
                f"unknown notebook {word!r}{scales.nearest(word, names)}: use all, or some of {choices}."
            )
    chosen = {names[word] for word in wanted}
    return [book for book in known if book in chosen]


def parse_changes(texts: list[str], scale: str, notebooks: list[Notebook]) -> dict[str, dict[str, Any]]:
    """["encoder_ctc.steps=500"] -> {"encoder_ctc": {"steps": 500}}, each checked against the presets.

    Values are Python literals, else text. Raises InputError for a wrong form, stage, field or type.
    """
    scales.check(scale, scales.SCALES, "scale")
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
        if not match:
            raise InputError(
                f"--set got {text!r}, expected stage.field=value such as encoder_ctc.steps=500: write it so."
            )
        stage, field, value = match.groups()
        changes.setdefault(stage, {})[field] = literal(value)
    for stage, fields in changes.items():
        changes[stage] = scales.load(stage, scale, **fields).changes
        if stage not in [book.stage for book in notebooks]:
            trained = ", ".join(book.stage for book in notebooks if book.stage) or "none"
            raise InputError(
                f"--set names stage {stage!r}, but the notebooks asked for train {trained}: add its notebook."
            )
    return changes


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_parameters(notebook: Notebook) -> None:
    """Raise InputError unless the one cell tagged `parameters` assigns literals to exactly the known names."""
    import papermill

    tagged = [cell for cell in notebook.cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise InputError(
            f"{notebook.path.name} has {len(tagged)} cells tagged parameters, expected one: mend the tags."
        )
    if not literals_only("".join(tagged[0]["source"])):
        raise InputError(
            f"the parameters cell of {notebook.path.name} holds more than NAME = literal lines: keep literals only."
        )
    names = set(papermill.inspect_notebook(str(notebook.path)))
    for name in [*sorted(names - set(PARAMETERS)), *sorted(set(PARAMETERS) - names)]:
        what = "unknown parameter" if name in names else "missing parameter"
        near = scales.nearest(name, PARAMETERS) if name in names else ""
        raise InputError(
            f"{what} {name!r} in {notebook.path.name}{near}: the cell must set {', '.join(PARAMETERS)}."
        )


def literals_only(source: str) -> bool:
    """Whether a cell consists of assignments of literals to plain names."""
    try:
        for line in ast.parse(source).body:
            ast.literal_eval(line.value)
            if not (
                isinstance(line, ast.Assign) and all(isinstance(target, ast.Name) for target in line.targets)
            ):
                return False
    except (AttributeError, ValueError, SyntaxError):
        return False
    return True


def check_request(notebooks: list[Notebook], settings: Settings) -> None:
    """Everything that can be refused before a kernel starts."""
    if not re.fullmatch(r"[\w.-]*", settings.variant):
        raise InputError(
            f"variant {settings.variant!r} is no folder name: use letters, digits, dots and dashes."
        )
    for notebook in notebooks:
        check_parameters(notebook)
    try:
        settings.root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.root).close()
    except OSError as error:
        raise InputError(
            f"{settings.root} cannot be written ({error}): choose another folder with --runs."
        ) from None


# ---- what is already done --------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parents_before(notebook: Notebook, settings: Settings) -> dict[str, str]:
    """Hashes of the stages that a notebook without a stage of its own may look at: those of earlier notebooks."""
    earlier = [stage for name, (stage, _) in COURSE.items() if stage and name < notebook.name]
    weights = {stage: settings.root / stage / "weights.safetensors" for stage in earlier}
    return {stage: sha256_of(path) for stage, path in weights.items() if path.is_file()}


def is_current(notebook: Notebook, settings: Settings) -> bool:
    """Whether a finished run of this notebook agrees in source, library, preset, seed and parents."""
    folder = settings.folder(notebook)
    done = read_json(folder / RUN_FILE)
    record = read_json(folder / "stage.json") if notebook.stage else done
    # Through JSON and back, so that tuples and lists compare equal.
    facts = json.loads(json.dumps(settings.facts(notebook)))
    if not done or any(record.get(name) != value or done.get(name) != value for name, value in facts.items()):
        return False
    if notebook.stage:
        return stage_stands(folder, notebook.stage, settings)
    return done.get("parents") == parents_before(notebook, settings)


def stage_stands(folder: Path, stage: str, settings: Settings) -> bool:
    """Whether a stage folder is whole and its parents hold the weights that it was trained on."""
    from . import stages

    try:
        trained = stages.read(folder, stage, settings.scale)
        for full_name in trained.record["parents"]:
            parent, _, variant = full_name.partition("@")
            if not variant and stages.own_variant(parent, settings.scale, settings.runs, settings.variant):
                return False  # the variant has this parent by now
            trained.check_parents(stages.load(parent, settings.scale, settings.runs, variant, quiet=True))
    except UserError:
        return False
    return True


def write_record(notebook: Notebook, settings: Settings, seconds: float) -> None:
    """run.json: the facts of a finished run, for --resume, the time left and the gallery."""
    record = settings.facts(notebook) | {
        "notebook": notebook.name,
        "title": notebook.title,
        "seconds": round(seconds, 1),
    }
    if not notebook.stage:
        record["parents"] = parents_before(notebook, settings)
    atomic_write_json(settings.folder(notebook) / RUN_FILE, record)
