"""Run notebooks in order through papermill: one kernel per notebook, and per rank when torchrun starts us.

A kernel is always this Python (no kernelspec of the user can shadow it), works in the repository root, and dies with
us. Everything that can be wrong with the request is refused before the first kernel starts.
"""

import ast
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, errors, scales
from .errors import InputError, UserError
from .files import atomic_write_json, sha256_of

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = ("SCALE", "CHANGES", "SEED", "RUNS", "VARIANT")
RUN_FILE = "run.json"
SOCKET_PATH_LIMIT = 80  # operating systems cut the path of a local socket at about 100 characters

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


class NotebookFailed(Exception):
    """A notebook stopped: one sentence naming notebook and cell, and the end of the traceback."""

    def __init__(self, sentence: str, log: str = "") -> None:
        super().__init__(sentence)
        self.log = log


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


# ---- ranks -----------------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """This process among those that torchrun started. Rank 0 decides, the others follow, through torchrun's store."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Raises InputError if several ranks were started by something else than torchrun."""
        ranks = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        if ranks.world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise InputError(
                "several ranks are started with torchrun: torchrun --nproc_per_node=2 -m freeze_omni_lite run ..."
            )
        return ranks

    @functools.cached_property
    def store(self) -> Any:
        from torch.distributed import TCPStore

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*address, self.world, is_master=False)

    def agree(self, question: str, decide: Callable[[], str]) -> str:
        """Rank 0's answer, on every rank. Waiting is done in small steps, so that a signal can end it."""
        if self.world == 1:
            return decide()
        key = f"freeze_omni/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{question}"
        if self.rank == 0:
            self.store.set(key, decide())
        while not self.store.check([key]):
            time.sleep(0.1)
        return self.store.get(key).decode()

    def environment(self, notebook: Notebook) -> dict[str, str]:
        """A meeting point of their own for this notebook's kernels: the keys of a used one would be taken for new."""
        if "MASTER_PORT" not in os.environ:
            return {}
        port = self.agree(f"port of {notebook.name}", free_port)
        return {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


# ---- one notebook ----------------------------------------------------------------------------------------------------


def kernel_manager(folder: Path):
    """A manager that starts this Python as the kernel, with its sockets in `folder` if the path is short enough."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="this Python",
            language="python",
        )

    local = hasattr(socket, "AF_UNIX") and len(str(folder)) < SOCKET_PATH_LIMIT
    transport = {"transport": "ipc", "ip": str(folder / "k")} if local else {"transport": "tcp"}
    return OwnKernel(kernel_name="python3", connection_file=str(folder / "kernel.json"), **transport)


def kill_group(manager: Any) -> None:
    """End the kernel and the worker processes that it started: its own process group, and nothing else."""
    group = getattr(manager.provisioner, "pgid", None)
    if group and group != os.getpgid(0):
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


@functools.cache
def register_engine() -> str:
    """Teach papermill to run a notebook on a kernel manager of ours and to tell how far it is. Returns the name."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class Client(PapermillNotebookClient):
        def process_message(self, message, cell, cell_index):
            text = message["content"].get("text") if message["msg_type"] == "stream" else None
            self.tell(cell_index, len(self.nb.cells), text or "")
            return super().process_message(message, cell, cell_index)

        def papermill_execute_cells(self):
            try:
                super().papermill_execute_cells()
            except (KeyboardInterrupt, SystemExit):
                kill_group(self.km)  # at once: the polite way waits for the cell
                # asyncio would report the tasks that this leaves unfinished
                logging.getLogger("asyncio").disabled = True
                raise

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man, kernel_name, *, manager, env, tell, log_output, start_timeout, **_
        ):
            client = Client(
                nb_man, km=manager, startup_timeout=start_timeout, timeout=None, store_widget_state=False
            )
            client.tell = tell
            client.execute(env=env, cwd=str(ROOT), cleanup_kc=True)

    papermill_engines.register("freeze_omni", Engine)
    return "freeze_omni"


def kernel_environment(notebook: Notebook, ranks: Ranks, device: str | None, folder: Path) -> dict[str, str]:
    """This process's environment (thread counts, RANK, ...), and what the notebook and its library ask for."""
    return {
        **os.environ,
        **ranks.environment(notebook),
        "FREEZE_OMNI_SOURCE_HASH": notebook.source_hash,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(folder / "ipython"),  # no start-up files, no history of the user's
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **({"FREEZE_OMNI_DEVICE": device} if device else {}),
    }


def execute(
    notebook: Notebook, settings: Settings, ranks: Ranks, device: str | None, tell: Callable
) -> float:
    """Run one notebook and keep the executed copy. Returns seconds; raises NotebookFailed, or UserError from a cell."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    output = settings.folder(notebook) / (
        "notebook.ipynb" if ranks.rank == 0 else f"notebook.rank{ranks.rank}.ipynb"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        (output.parent / RUN_FILE).unlink(missing_ok=True)
    folder, begin = Path(tempfile.mkdtemp(prefix="fo-")), time.perf_counter()
    manager = kernel_manager(folder)
    try:
        papermill.execute_notebook(
            str(notebook.path),
            str(output),
            settings.parameters(notebook),
            engine_name=register_engine(),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,
            manager=manager,
            env=kernel_environment(notebook, ranks, device, folder),
            tell=tell,
        )
    except papermill.PapermillExecutionError as error:
        raise failure(notebook, ranks, error, output) from None
    except DeadKernelError:
        raise NotebookFailed(
            f"notebook {notebook.name} stopped: its kernel died, most often for lack of memory."
        ) from None
    finally:
        kill_group(manager)
        shutil.rmtree(folder, ignore_errors=True)
    return time.perf_counter() - begin


def failure(notebook: Notebook, ranks: Ranks, error: Any, output: Path) -> Exception:
    """A failing cell as one sentence: UserError for what a person can mend, else NotebookFailed with the traceback."""
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    # The first arrow points into the cell, later ones into the library.
    arrow = re.search(r"^-+> *\d+ (.*)$", trace, re.MULTILINE)
    line = (arrow[1] if arrow else error.source).strip().split("\n")[0]
    place = f"notebook {notebook.name}, cell {error.exec_count} ({line[:60]})"
    place += f", rank {ranks.rank}" if ranks.world > 1 else ""
    kind = getattr(errors, error.ename, None)
    if isinstance(kind, type) and issubclass(kind, UserError) and kind is not errors.FrozenChanged:
        return kind(f"{place}: {error.evalue}")
    reason = f"{error.ename}: {error.evalue.splitlines()[0]}" if error.evalue else error.ename
    sentence = f"{place} failed with {reason}"
    return NotebookFailed(f"{sentence} (executed so far: {output}).", "\n".join(trace.splitlines()[-15:]))


# ---- the run ---------------------------------------------------------------------------------------------------------


class Progress:
    """Lines for the person who waits: a live one inside a notebook, a lasting one after each."""

    def __init__(self, notebooks: list[Notebook], settings: Settings, shown: bool) -> None:
        self.rest, self.shown, self.count = list(notebooks), shown, len(notebooks)
        self.live = shown and sys.stderr.isatty()
        records = {book.name: read_json(settings.folder(book) / RUN_FILE) for book in notebooks}
        self.measured = {name: record["seconds"] for name, record in records.items() if "seconds" in record}
        self.spent, self.shares = 0.0, 0.0
        self.line, self.cell, self.told = "", "", time.monotonic()

    def tell(self, notebook: Notebook, cell_index: int, cells: int, text: str) -> None:
        """Cell and last printed line, at most five times a second on a terminal, once in a minute elsewhere."""
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        self.line, self.cell = (lines or [self.line])[-1], f"cell {cell_index + 1} of {cells}"
        if not self.shown or time.monotonic() - self.told < (0.2 if self.live else 60):
            return
        self.told = time.monotonic()
        message = f"{notebook.number} {self.cell}  {self.line}"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{message[:width]:{width}}", end="", file=sys.stderr, flush=True)
        else:
            print(message, file=sys.stderr, flush=True)

    def finished(self, notebook: Notebook, seconds: float | None) -> None:
        """The lasting line; seconds None: an earlier run was kept."""
        self.rest.remove(notebook)
        self.line = ""
        if seconds is not None:
            self.spent, self.shares = self.spent + seconds, self.shares + notebook.share
        if not self.shown:
            return
        if self.live:
            print(f"\r{'':{shutil.get_terminal_size().columns - 1}}\r", end="", file=sys.stderr, flush=True)
        took = "kept" if seconds is None else duration(seconds)
        left = f", about {duration(self.left_seconds())} left" if self.rest and self.left_seconds() else ""
        done = self.count - len(self.rest)
        print(
            f"{notebook.number} {notebook.title[:60]:60} {took:>8}  ({done} of {self.count}{left})",
            flush=True,
        )

    def left_seconds(self) -> float:
        """From the last measured run of each notebook that is left, else from its share; 0 if nothing is known."""
        rate = self.spent / self.shares if self.shares else 0.0
        return sum(self.measured.get(book.name, book.share * rate) for book in self.rest)


def duration(seconds: float) -> str:
    """12 s, 3.4 min or 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def ending_on_terminate() -> Iterator[None]:
    """SIGTERM (torchrun's, when another rank failed) ends us as Ctrl-C does, so that the kernel is ended too."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    wanted: list[str],
    scale: str,
    *,
    changes: list[str] | None = None,
    variant: str = "",
    seed: int = 1,
    runs: str = "runs",
    resume: bool = False,
    device: str | None = None,
    notebooks: Path = NOTEBOOKS,
) -> Path:
    """Execute notebooks in course order at `scale` and return the path of the gallery.

    wanted   numbers or names, or ["all"]        changes  ["stage.field=value", ...]
    resume   keep a notebook whose last run agrees in source, library version, preset, seed and parents

    Raises UserError before anything runs if the request is wrong, NotebookFailed at the first failing cell.
    """
    from . import gallery

    chosen = select(wanted, notebooks)
    settings = Settings(scale, parse_changes(changes or [], scale, chosen), seed, runs, variant)
    check_request(chosen, settings)
    if device:
        check_device(device)
    ranks = Ranks.from_environment()
    progress = Progress(chosen, settings, shown=ranks.rank == 0)
    with ending_on_terminate():
        for notebook in chosen:
            one_notebook(notebook, settings, ranks, device, resume, progress)
    page = settings.root / gallery.PAGE
    if ranks.rank == 0:
        gallery.build(settings.root)
        near = page.is_relative_to(Path.cwd())
        print(f"gallery: {page.relative_to(Path.cwd()) if near else page}", flush=True)
    return page


def one_notebook(
    notebook: Notebook, settings: Settings, ranks: Ranks, device: str | None, resume: bool, progress: Progress
) -> None:
    """Run a notebook, or keep what an earlier run left; rank 0 decides for all."""
    skip = lambda: "keep" if resume and is_current(notebook, settings) else "run"  # noqa: E731
    if ranks.agree(f"keep {notebook.name}", skip) == "keep":
        progress.finished(notebook, None)
        return
    seconds = execute(notebook, settings, ranks, device, functools.partial(progress.tell, notebook))
    if ranks.rank == 0:
        write_record(notebook, settings, seconds)
    progress.finished(notebook, seconds)


def check_device(device: str) -> None:
    """Raise InputError for a device that is not there."""
    from .ranks import device as pick_device

    pick_device(device)
