"""Rows, tables, and a README that shows what the committed results say."""

import pytest

from freeze_omni_lite import results
from freeze_omni_lite.errors import InputError

RECORD = {
    "what": "listening",
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
    "command": "freeze-omni measure listening",
    "cpu": "a CPU",
    "threads": 2,
    "torch": "2",
    "rows": [
        results.row("CER", 1.84, 300, "test set", bar="<= 2"),
        results.row("lost", 4.0, 300, "a | b", "points", "<= 5", (1.25, 6.75)),
        results.row("recall", "not measured: no scene", 0, "none", bar=">= 95"),
    ],
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def test_the_readme_shows_the_committed_results():
    text = results.README.read_text(encoding="utf-8")
    assert results.MARKED.search(text) and results.render_readme(text) == text


def test_without_a_result_it_says_so(folder):
    text = "a\n<!-- results: listening -->\nold\n<!-- end -->\nb\n"
    shown = results.render_readme(text)
    assert "Not measured yet" in shown and "old" not in shown
    with pytest.raises(InputError, match=r"no result 'listening'.*none yet"):
        results.load("listening")


def test_a_result_is_a_table(folder):
    results.write(RECORD)
    assert results.load("listening") == RECORD
    lines = results.markdown("listening").splitlines()
    assert lines[2] == "| CER | 1.84 % | <= 2 % | yes | 300 | test set |"
    assert lines[3] == "| lost | 4 points (1.25 to 6.75) | <= 5 points | yes | 300 | a / b |"
    assert lines[4] == "| recall | not measured: no scene | >= 95 % | no | 0 | none |"
    assert "2026-01-02, commit 01234567" in lines[-1]
    once = results.render_readme("<!-- results: listening -->\n<!-- end -->")
    assert results.render_readme(once) == once and once.count("\n|") == 5


def test_bars():
    assert [results.reached(5.0, f"{sign} 5") for sign in ("<", "<=", ">", ">=")] == [
        False,
        True,
        False,
        True,
    ]
