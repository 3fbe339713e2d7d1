"""The notebooks: facts that keep them readable and diffable, then all of them run at tiny, and the verbs on the result.

`pytest -m "not slow"` leaves out what executes them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from freeze_omni_lite import course
from freeze_omni_lite.__main__ import main

BOOKS = [course.Notebook(path) for path in sorted(course.NOTEBOOKS.glob("*.ipynb"))]
each_notebook = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)

# The headings of a notebook, in this order. One that trains a stage has all of them, the others leave some out.
HEADINGS = (
    "Where we are",
    "Parameters",
    "The data",
    "The idea",
    "Assemble",
    "Train",
    "Look and listen",
    "Check",
    "Exercise",
    "At paper scale",
)
ALWAYS = ("Where we are", "Parameters", "Look and listen", "Check")


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(book: course.Notebook) -> list[dict]:
    return [cell for cell in book.cells if cell["cell_type"] == "code"]


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_the_course_is_complete():
    assert [book.name for book in BOOKS] == list(course.COURSE)


@each_notebook
def test_stripped(book):
    for number, cell in enumerate(code_cells(book), start=1):
        assert not cell["outputs"] and cell["execution_count"] is None, (
            f"code cell {number} holds outputs: run nbstripout"
        )


@each_notebook
def test_kernel_is_python3(book):
    metadata = json.loads(book.path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3" and metadata["kernelspec"]["language"] == "python"


@each_notebook
def test_one_parameters_cell_of_literals(book):
    course.check_parameters(book)
    cell = next(cell for cell in code_cells(book) if "parameters" in tags(cell))
    names = re.findall(r"^(\w+) *=", source(cell), re.MULTILINE)
    assert tuple(names) == course.PARAMETERS
    assert "scale ==" not in "\n".join(map(source, code_cells(book))).lower(), (
        "scales differ in scales.py only"
    )


@each_notebook
def test_the_next_cell_starts_the_notebook(book):
    cells = code_cells(book)
    after = cells[next(number for number, cell in enumerate(cells) if "parameters" in tags(cell)) + 1]
    assert re.search(r"start\(SCALE, CHANGES, SEED, RUNS, VARIANT", source(after))
    assert not book.stage or f'stage="{book.stage}"' in source(after)


@each_notebook
def test_has_a_check(book):
    assert any("check" in tags(cell) and "assert" in source(cell) for cell in code_cells(book))


@each_notebook
def test_every_exercise_has_a_solution_and_a_check(book):
    kinds = [
        kind for cell in code_cells(book) for kind in tags(cell) if kind in ("exercise", "solution", "check")
    ]
    for number, kind in enumerate(kinds):
        if kind == "exercise":
            assert kinds[number + 1 : number + 3] == ["solution", "check"], f"exercise {number + 1}: {kinds}"
    assert not book.stage or "exercise" in kinds


@each_notebook
def test_headings_in_one_order(book):
    prose = "\n".join(source(cell) for cell in book.cells if cell["cell_type"] == "markdown")
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1, "one title"
    found = [re.sub(r"^[\d.\s]+", "", heading) for heading in re.findall(r"^## +(.+)$", prose, re.MULTILINE)]
    known = [next((start for start in HEADINGS if heading.startswith(start)), heading) for heading in found]
    wanted = [heading for heading in HEADINGS if heading in known or heading in ALWAYS or book.stage]
    if "Train" not in known and book.stage == "speech_tokens":  # trains nothing: it puts the codec to work
        wanted.remove("Train")
    assert known == wanted


@each_notebook
def test_listed_in_the_readme(book):
    readme = (course.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"notebooks/{book.path.name}" in readme


# ---- executed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A runs folder in which the whole course ran at tiny."""
    runs = tmp_path_factory.mktemp("course") / "runs"
    done = freeze_omni("run", "all", "--runs", str(runs))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" of 13") == 13
    return runs


def freeze_omni(*words: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, at tiny."""
    command = [sys.executable, "-m", "freeze_omni_lite", *words, "--scale", "tiny"]
    environment = os.environ | {"FREEZE_OMNI_PRECISION": "no"}
    return subprocess.run(command, cwd=course.ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture
def verb(finished, capsys):
    """verb("talk", ...) -> exit status, standard output and standard error, on the stages of the course."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([*map(str, words), "--scale", "tiny", "--runs", str(finished), "--device", "cpu"])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def question(tmp_path_factory) -> Path:
    """A real recording of data_samples, as 8 kHz stereo."""
    found = sorted(
        path for ending in ("wav", "flac") for path in (course.ROOT / "data_samples").rglob(f"*.{ending}")
    )
    assert found, "data_samples holds no recording"
    from freeze_omni_lite import audio

    waveform = audio.load(found[0], 8000)[: 4 * 8000].numpy()
    path = tmp_path_factory.mktemp("question") / "question.wav"
    soundfile.write(path, np.stack([waveform, 0.5 * waveform], axis=1), 8000)
    return path


@pytest.mark.slow
@each_notebook
def test_executed(book, finished):
    settings = course.Settings("tiny", {}, runs=str(finished))
    folder = settings.folder(book)
    record = json.loads((folder / "run.json").read_text())
    assert record["seconds"] > 0 and record["source_hash"] == book.source_hash
    executed = json.loads((folder / "notebook.ipynb").read_text())
    assert not [
        out for cell in executed["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"
    ]
    if book.stage:
        stage = json.loads((folder / "stage.json").read_text())
        assert stage["source_hash"] == book.source_hash and stage["preset"] and stage["metrics"]


@pytest.mark.slow
def test_gallery_shows_every_notebook(finished):
    page = (finished / "tiny/index.html").read_text()
    for book in BOOKS:
        assert f'href="{book.stage or book.name}/notebook.html"' in page
        assert (finished / "tiny" / (book.stage or book.name) / "notebook.html").is_file()
    assert "<img" in page and "<audio" in page and "<pre>" in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page), "the page needs no network"


@pytest.mark.slow
def test_resume_keeps_everything(finished):
    done = freeze_omni("run", "all", "--runs", str(finished), "--resume")
    assert done.returncode == 0, done.stderr
    assert sum("kept" in line for line in done.stdout.splitlines()) == len(BOOKS)


@pytest.mark.slow
def test_talk_answers_a_recording(verb, question, tmp_path):
    wav, trace = tmp_path / "answer.wav", tmp_path / "trace.json"
    status, printed, errors = verb("talk", question, "-o", wav, "--json", trace)
    assert status == 0 and "stages from" in errors and question.name in printed
    told = json.loads(trace.read_text())
    wanted = "outcome forced states transcript text latency_ms rtf stages judge versions"
    assert set(wanted.split()) <= set(told)
    assert told["outcome"] in ("answered", "ignored", "no_speech")
    assert [state["t_ms"] for state in told["states"]] == [160 * (n + 1) for n in range(len(told["states"]))]
    assert wav.is_file() == (told["outcome"] == "answered" and bool(told["text"].strip()))
    assert not wav.is_file() or soundfile.info(wav).samplerate == 24000


@pytest.mark.slow
def test_talk_waits_if_told_so(verb, question, tmp_path):
    status, _, _ = verb("talk", question, "--end-of-file", "wait", "--out-dir", tmp_path / "out")
    assert status == 0
    told = json.loads((tmp_path / "out/question.json").read_text())
    assert told["forced"] is False
    assert (tmp_path / "out/question.wav").is_file() == (
        told["outcome"] == "answered" and bool(told["text"].strip())
    )


@pytest.mark.slow
@pytest.mark.parametrize("through", ["llm", "ctc"])
def test_transcribe_answers(verb, question, tmp_path, through):
    status, printed, _ = verb("transcribe", question, "--through", through, "--json", tmp_path / "t.json")
    told = json.loads((tmp_path / "t.json").read_text())
    assert status == 0 and told["through"] == through and printed.strip() == told["text"].strip()
    assert told["stages"]


@pytest.mark.slow
def test_ask_answers(verb, tmp_path):
    status, printed, _ = verb("ask", "What is the capital of France?")
    assert status == 0 and printed.strip()


@pytest.mark.slow
def test_speak_answers_the_same_for_one_seed(verb, tmp_path):
    for name in ("a", "b"):
        assert verb("speak", "Good morning.", "-o", tmp_path / f"{name}.wav", "--seed", "3")[0] == 0
    first, second = (soundfile.read(tmp_path / f"{name}.wav") for name in ("a", "b"))
    assert first[1] == 24000 and len(first[0]) > 0 and np.array_equal(first[0], second[0])


@pytest.mark.slow
def test_codec_keeps_the_length(verb, question, tmp_path):
    status, printed, _ = verb("codec", question, "-o", tmp_path / "c.wav")
    assert status == 0 and "bit/s" in printed
    assert soundfile.info(tmp_path / "c.wav").duration == pytest.approx(
        soundfile.info(question).duration, abs=0.03
    )


@pytest.mark.slow
def test_stages_of_another_scale_or_shape_are_refused(finished, question, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished / "tiny/codec", runs / "gpu/codec")
    command = ["codec", str(question), "-o", str(tmp_path / "c.wav"), "--runs", str(runs)]
    assert main([*command, "--scale", "gpu"]) == 2
    assert "at scale 'tiny', expected" in capsys.readouterr().err
    shutil.copytree(finished / "tiny/codec", runs / "tiny/codec")
    record = runs / "tiny/codec/stage.json"
    told = json.loads(record.read_text())
    told["preset"]["width"] *= 2
    record.write_text(json.dumps(told))
    assert main([*command, "--scale", "tiny"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "c.wav").exists()
