"""Results worth citing: data_samples/results/<name>.json, as rows, as a table, and in the README.

`python -m freeze_omni_lite.results` writes the README's tables anew; a test compares. A row says what was measured,
the figure with its unit, the bar it should reach ("<= 2", "" for none), on how many items and of which set.
"""

import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .course import ROOT
from .errors import InputError
from .files import atomic_write_json, atomic_write_text

FOLDER = ROOT / "data_samples" / "results"
README = ROOT / "README.md"
COLUMNS = ("what", "figure", "bar", "reached", "items", "set")
BARS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def row(
    what: str,
    figure: float | str,
    items: int,
    where: str,
    unit: str = "%",
    bar: str = "",
    interval: Sequence[float] = (),
) -> Row:
    """One row of a table.

    figure     a number in `unit`, or "not measured: <reason>"
    where      the set, and who judged it
    interval   95 % interval of the figure: low, high
    """
    found = {"what": what, "figure": figure, "unit": unit, "bar": bar, "items": items, "set": where}
    return found | ({"interval": list(interval)} if interval else {}) | {"reached": reached(figure, bar)}


def reached(figure: float | str, bar: str) -> bool | None:
    """Whether a figure meets its bar; None without a bar. What was not measured has not reached it.

    >>> reached(1.8, "<= 2"), reached(90, "> 90"), reached("not measured: no scene", "> 90"), reached(3, "")
    (True, False, False, None)
    """
    if not bar:
        return None
    sign, limit = bar.split()
    return not isinstance(figure, str) and BARS[sign](figure, float(limit))


def write(record: dict[str, Any], path: Path | None = None) -> Path:
    """Write the record {"what", "date", ..., "rows"} to `path`, or to its place among the results worth citing."""
    return atomic_write_json(path or FOLDER / f"{record['what']}.json", record)


def load(name: str) -> dict[str, Any]:
    """The committed result of that name. Raises InputError if there is none."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(path.stem for path in FOLDER.glob("*.json"))) or "none yet"
        raise InputError(
            f"no result {name!r} in data_samples/results (there: {there}): measure it, and write it there with -o."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def cells(found: Row) -> dict[str, str]:
    """A row as people read it, column by column."""
    figure, unit = found["figure"], f" {found['unit']}" if found["unit"] else ""
    shown = figure if isinstance(figure, str) else f"{number(figure)}{unit}"
    if "interval" in found:
        shown += " ({} to {})".format(*map(number, found["interval"]))
    bar = f"{found['bar']}{unit}" if found["bar"] else ""
    said = {True: "yes", False: "no", None: ""}[found["reached"]]
    values = (found["what"], shown, bar, said, str(found["items"]), found["set"])
    return dict(zip(COLUMNS, values, strict=True))


def number(value: float) -> str:
    """Three figures, whole numbers as they are.

    >>> number(12.345), number(0.0712), number(300), number(1234.5)
    ('12.3', '0.0712', '300', '1234')
    """
    return str(value) if isinstance(value, int) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def markdown(name: str) -> str:
    """The result as a table with its circumstances below, or a line that says it is not measured yet."""
    if not (FOLDER / f"{name}.json").is_file():
        return f"Not measured yet: `freeze-omni measure {name} -o data_samples/results/{name}.json`.\n"
    record = load(name)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(list(cells(found).values()) for found in record["rows"])]
    table = "".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |\n" for line in lines)
    commit = str(record["commit"])
    commit = commit[:8] + "+" * commit.endswith("+")  # "+": files differed from it
    facts = f"`{record['command']}`, {record['date']}, commit {commit}, torch {record['torch']}"
    return f"{table}\n{facts}, {record['cpu']}, {record['threads']} threads.\n"


def render_readme(text: str) -> str:
    """The text with every block between `<!-- results: name -->` and `<!-- end -->` filled from its result."""
    return MARKED.sub(lambda found: f"{found[1]}{markdown(found[2])}{found[3]}", text)


if __name__ == "__main__":
    atomic_write_text(README, render_readme(README.read_text(encoding="utf-8")))
