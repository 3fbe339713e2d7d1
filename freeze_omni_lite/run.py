"""Run notebooks in order: a kernel for each, a line of progress for each, a gallery at the end."""

import contextlib
import functools
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .course import (
    NOTEBOOKS,
    RUN_FILE,
    Notebook,
    Settings,
    check_request,
    is_current,
    parse_changes,
    read_json,
    select,
    write_record,
)
from .kernel import Ranks, execute


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
