"""One page for everything that a run drew, spoke and printed: runs/<scale>/index.html, opened by double click.

For each executed notebook: its title, its seconds, the outputs of its "Look and listen" part, and a link to the whole
notebook as HTML beside it. Figures and sounds are inside the page, so it can be copied anywhere.
"""

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import atomic_write_text

PAGE = "index.html"
PART = re.compile(r"^#+ .*look and listen", re.IGNORECASE | re.MULTILINE)
LONGEST_TEXT_LINES = 40

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
p.facts { color: #666; margin: 0 0 .8rem; }
img, svg { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
pre { background: #f5f5f2; padding: .6rem; overflow-x: auto; font-size: .85rem; line-height: 1.35; }
table { border-collapse: collapse; } td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; }
  pre { background: #262626; } a { color: #8cb4ff; } img, svg { background: #fff; }
}
"""


def build(root: Path) -> Path:
    """Write root/index.html, and notebook.html beside every finished notebook below `root`."""
    entries = sorted(
        root.glob("*/run.json"), key=lambda path: (read(path).get("notebook", ""), path.parent.name)
    )
    sections = [section(path.parent) for path in entries if (path.parent / "notebook.ipynb").is_file()]
    title = f"freeze_omni_lite: the course at scale {html.escape(root.name)}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = f"<h1>{title}</h1>\n{''.join(sections) or '<p>No notebook has been run to its end yet.</p>'}"
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'
    return atomic_write_text(root / PAGE, page)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def section(folder: Path) -> str:
    """One notebook's part of the page; its HTML copy is written only if the notebook is newer."""
    record, notebook = read(folder / "run.json"), folder / "notebook.ipynb"
    copy = folder / "notebook.html"
    if not copy.is_file() or copy.stat().st_mtime < notebook.stat().st_mtime:
        atomic_write_text(copy, whole_notebook(notebook))
    name, title = html.escape(folder.name), html.escape(record["title"])
    facts = f'{record["seconds"]:.0f} s, seed {record["seed"]}, <a href="{name}/notebook.html">executed notebook</a>'
    changes = f", changed: {html.escape(str(record['changes']))}" if record.get("changes") else ""
    outputs = "\n".join(shown(output) for output in looked_at(read(notebook)["cells"]))
    number = html.escape(record["notebook"].split("_")[0])
    return (
        f'<h2 id="{name}">{number} {title}</h2>\n<p class="facts">{name}: {facts}{changes}</p>\n{outputs}\n'
    )


def whole_notebook(path: Path) -> str:
    """The executed notebook as one HTML page; nothing but the formulas' typesetting is looked for online."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        embed_images=True, require_js_url="", jquery_url="", mermaid_js_url="", widget_renderer_url=""
    )
    return exporter.from_filename(str(path))[0]


def looked_at(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Outputs below the heading "Look and listen", up to the next heading of its rank; all if there is none."""
    texts = ["".join(cell["source"]) if cell["cell_type"] == "markdown" else "" for cell in cells]
    starts = [number for number, text in enumerate(texts) if PART.search(text)]
    first = starts[0] if starts else 0
    level = len(re.match(r"#+", PART.search(texts[first])[0])[0]) if starts else 0
    for number, cell in enumerate(cells[first:]):
        if starts and number and re.search(rf"^#{{1,{level}}} ", texts[first + number], re.MULTILINE):
            return
        yield from cell.get("outputs", [])


def shown(output: dict[str, Any]) -> str:
    """An output as HTML: figures, players and tables as they are, printed text as text, the rest left out."""
    if output["output_type"] == "stream":
        return as_text(output["text"]) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/svg+xml" in data:
        # As an image, so that the identifiers of two figures cannot meet.
        encoded = base64.b64encode("".join(data["image/svg+xml"]).encode()).decode()
        return f'<img alt="{alternative(data)}" src="data:image/svg+xml;base64,{encoded}">'
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="{alternative(data)}" src="data:image/png;base64,{encoded}">'
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a widget needs a kernel; the static figure stands before it
    if "text/html" in data:
        return "".join(data["text/html"])
    return as_text(data["text/plain"]) if "text/plain" in data else ""


def alternative(data: dict[str, Any]) -> str:
    return html.escape("".join(data.get("text/plain", "figure")), quote=True)


def as_text(text: str | list[str]) -> str:
    lines = "".join(text).rstrip().splitlines()
    left_out = len(lines) - LONGEST_TEXT_LINES
    kept = lines[:LONGEST_TEXT_LINES] + (
        [f"... {left_out} more lines in the notebook"] if left_out > 0 else []
    )
    return f"<pre>{html.escape(chr(10).join(kept))}</pre>" if lines else ""
