"""What is asked for is checked before anything heavy loads; the table is printed and written."""

import importlib
import json
import subprocess
import sys

import pytest

from freeze_omni_lite import course, measure
from freeze_omni_lite.__main__ import main
from freeze_omni_lite.errors import InputError


def test_every_measure_has_its_parts():
    for name, parts in measure.MEASURES.items():
        module = importlib.import_module(f"freeze_omni_lite.{name}")
        assert all(callable(getattr(module, part)) for part in parts)


def test_parts_in_their_order():
    assert measure.check("listening", "duplex, ctc", 1) == ["ctc", "duplex"]
    assert len(measure.check("listening", None, 300)) == 7


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (("listning", None, 1), "unknown measure 'listning' .did you mean listening"),
        (("listening", "ctc,duplx", 1), "unknown part of measure listening 'duplx' .did you mean duplex"),
        (("listening", "", 1), "unknown part of measure listening ''"),
        (("listening", None, 0), "--items is 0, expected 1 or more"),
    ],
)
def test_mistakes_are_one_sentence(request_, sentence):
    with pytest.raises(InputError, match=sentence):
        measure.check(*request_)


@pytest.mark.parametrize(
    "words", ["measure speling", "measure listening --only ctx", "measure listening --items 0"]
)
def test_a_mistake_loads_nothing_heavy(words):
    program = (
        "import sys\nfrom freeze_omni_lite.__main__ import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", program, *words.split()]
    done = subprocess.run(command, cwd=course.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_missing_stages_are_one_sentence(tmp_path, capsys):
    assert main(["measure", "listening", "--scale", "gpu", "--runs", str(tmp_path), "--only", "ctc"]) == 2
    assert "stage 'encoder_ctc' at scale 'gpu' not found" in capsys.readouterr().err


def test_table_and_record(tmp_path, monkeypatch, capsys):
    row = {"what": "a", "figure": 1.0, "unit": "%", "bar": "<= 2", "items": 3, "set": "b", "reached": True}
    monkeypatch.setattr(measure, "measure", lambda what, **request: {"what": what, "rows": [row], **request})
    out = tmp_path / "new" / "a.json"
    assert main(["measure", "listening", "--only", "ctc", "-o", str(out)]) == 0
    assert json.loads(out.read_text())["items"] == measure.ITEMS
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["what", "figure", "bar", "reached", "items", "set"] and "1 %" in table[1]


def test_progress_is_told_every_ten_seconds(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 11.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = measure.Progress("scenes", 30)
    for _ in range(3):
        progress.add(5)
    assert capsys.readouterr().err == "  scenes: 10/30, about 22 s left\n"
