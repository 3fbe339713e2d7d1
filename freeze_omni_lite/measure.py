"""`freeze-omni measure NAME`: the figures that an issue asks for, of the stages at hand, as one table and as JSON.

A measure is an entry of MEASURES and a file of that name with one function a part: part(system, items, seed) gives
rows of results.row. Nothing heavy is imported before the request is checked.
"""

import datetime
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import results
from .errors import InputError

if TYPE_CHECKING:
    from .system import System

ITEMS = 300
HEARING = ("encoder_ctc", "encoder_adapter")
SPEAKING = ("codec", "decoder_nar_ar", "decoder_prefix")
TALKING = (*HEARING, "encoder_prompt", "duplex", *SPEAKING)
# measure -> part -> the stages that it needs
MEASURES: dict[str, dict[str, tuple[str, ...]]] = {
    "listening": {
        "ctc": ("encoder_ctc",),
        "llm": HEARING,
        "questions": (*HEARING, "encoder_prompt"),
        "duplex": (*HEARING, "encoder_prompt", "duplex"),
        "stream": HEARING,
        "human": HEARING,
        "frozen": (*HEARING, "encoder_prompt", "duplex"),
    },
    "conversation": {
        "turns": TALKING,
        "pauses": TALKING,
        "overlaps": TALKING,
        "disturbances": TALKING,
        "memory": (*HEARING, "encoder_prompt", "duplex"),
    },
    "speaking": {
        "codec": ("codec",),
        "answers": SPEAKING,
        "free": SPEAKING,
        "speed": SPEAKING,
        "sound": SPEAKING,
    },
}


def check(what: str, only: str | None, items: int) -> list[str]:
    """The parts to measure, in their order. Raises InputError for an unknown name or no items."""
    known(what, MEASURES, "measure")
    if items < 1:
        raise InputError(
            f"--items is {items}, expected 1 or more: give how many items a figure should rest on."
        )
    wanted = [name.strip() for name in only.split(",")] if only is not None else list(MEASURES[what])
    for name in wanted:
        known(name, MEASURES[what], f"part of measure {what}")
    return [name for name in MEASURES[what] if name in wanted]


def known(name: str, names: Sequence[str], kind: str) -> None:
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"unknown {kind} {name!r}{hint}: use one of {', '.join(names)}.")


def measure(
    what: str,
    *,
    only: str | None = None,
    items: int = ITEMS,
    scale: str | None = None,
    runs: str = "runs",
    device: str | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Measure the parts of `what` and return the record: circumstances, stages, rows.

    Raises InputError for an unknown name, StageMissing for a stage that is not there.
    """
    parts = check(what, only, items)
    from .system import System

    measures = import_module(f".{what}", __package__)
    needs = dict.fromkeys(stage for part in parts for stage in MEASURES[what][part])
    system = System.load(scale, runs, tuple(needs), device)
    rows: list[results.Row] = []
    for part in parts:
        begin = time.perf_counter()
        say(f"{part} ...")
        rows += getattr(measures, part)(system, items, seed)
        say(f"{part}: {time.perf_counter() - begin:.0f} s")
    options = {"scale": scale, "only": only, "items": items if items != ITEMS else None}
    options |= {"device": device, "seed": seed if seed != 1 else None}
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    return {
        "what": what,
        **circumstances(system),
        "command": " ".join(["freeze-omni measure", what, *given]),
    } | {
        "stages": system.provenance(),
        "rows": rows,
    }


def circumstances(system: "System") -> dict[str, Any]:
    """What a figure needs beside it; no names of machines, people or folders."""
    import torch

    from .bench import cpu_name
    from .stages import commit
    from .threads import thread_count

    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_name(),
        "device": system.device.type,
        "threads": thread_count(),
        "torch": torch.__version__,
    }


def say(line: str) -> None:
    """A line of progress; the table alone goes to standard output."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """A line every ten seconds: what is done of how many, and about how long the rest takes."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count, self.done = what, count, 0
        self.begin = self.told = time.perf_counter()

    def add(self, items: int) -> None:
        self.done += items
        now = time.perf_counter()
        if now - self.told >= 10:
            left = (now - self.begin) / self.done * (self.count - self.done)
            say(f"  {self.what}: {self.done}/{self.count}, about {left:.0f} s left")
            self.told = now


def main(what: str, output: Path | None = None, **request: Any) -> int:
    """Measure, print the table, write the record to `output`. Returns 0, also where a bar is not reached."""
    record = measure(what, **request)
    from .evaluation import as_text

    print(as_text([results.cells(found) for found in record["rows"]]))
    if output is not None:
        results.write(record, output)
    return 0
