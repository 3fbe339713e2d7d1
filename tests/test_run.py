"""The runner on small made-up notebooks: order, failures, refusals, resume, ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freeze_omni_lite import course, gallery, kernel, run, scales
from freeze_omni_lite.__main__ import main
from freeze_omni_lite.errors import InputError, StageMissing, UserError

PARAMETERS = 'SCALE = "tiny"\nCHANGES = {}\nSEED = 1\nRUNS = "runs"\nVARIANT = ""'


def write_notebook(folder: Path, name: str, *sources: str, parameters: str = PARAMETERS) -> Path:
    """A notebook of a title, a parameters cell and the given cells; text that starts with # and a blank is prose."""
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": f"# {name}: a made-up notebook"},
        code_cell(parameters, "parameters"),
        *(prose(source) if source.startswith("## ") else code_cell(source) for source in sources),
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


def prose(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code_cell(source: str, *tags: str) -> dict:
    return {
        "cell_type": "code",
        "metadata": {"tags": list(tags)},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }


@pytest.fixture
def books(tmp_path):
    return tmp_path / "books"


def start(books: Path, tmp_path: Path, *wanted: str, scale: str = "tiny", **more):
    return run.run(list(wanted) or ["all"], scale, runs=str(tmp_path / "runs"), notebooks=books, **more)


def log(tmp_path: Path) -> str:
    return f"open({str(tmp_path / 'log')!r}, 'a').write"


def test_runs_in_order_with_the_parameters(books, tmp_path, capsys):
    note = log(tmp_path)
    write_notebook(books, "02_second", f"{note}(f'2 {{SCALE}} {{SEED}} {{VARIANT}} {{CHANGES}}\\n')")
    write_notebook(
        books,
        "01_first",
        f"{note}('1\\n')",
        "import freeze_omni_lite, os, sys; print(sys.executable, os.getcwd())",
    )
    start(books, tmp_path, "02", "1", seed=7, variant="v")
    assert (tmp_path / "log").read_text() == "1\n2 tiny 7 v {}\n"
    executed = json.loads((tmp_path / "runs/tiny/01_first@v/notebook.ipynb").read_text())
    printed = "".join("".join(out.get("text", "")) for out in executed["cells"][-1]["outputs"])
    assert printed.split() == [sys.executable, str(course.ROOT)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("01 ") and "1 of 2" in lines[0] and "left" in lines[0]
    assert lines[1].startswith("02 ") and "2 of 2" in lines[1] and lines[2].endswith("index.html")


def test_a_kernelspec_of_the_user_cannot_shadow_ours(books, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    spec.joinpath("kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    write_notebook(books, "01_first", "1 + 1")
    start(books, tmp_path)


def test_stops_at_the_first_failure_and_names_the_cell(books, tmp_path, capsys):
    note = log(tmp_path)
    write_notebook(books, "01_first", f"{note}('1')")
    write_notebook(books, "02_second", "x = 1", "print(x)\nloss = x / 0")
    write_notebook(books, "03_third", f"{note}('3')")
    with pytest.raises(
        kernel.NotebookFailed,
        match=r"notebook 02_second, cell 4 \(loss = x / 0\) failed with ZeroDivisionError",
    ) as error:
        start(books, tmp_path)
    assert "division by zero" in error.value.log
    assert (tmp_path / "log").read_text() == "1"
    assert (tmp_path / "runs/tiny/02_second/notebook.ipynb").is_file()
    assert not (tmp_path / "runs/tiny/02_second/run.json").exists()


def test_a_users_mistake_in_a_cell_stays_one(books, tmp_path):
    source = "from freeze_omni_lite.errors import StageMissing\nraise StageMissing('run notebook 01 first.')"
    write_notebook(books, "02_second", source)
    with pytest.raises(StageMissing, match=r"notebook 02_second, cell 3 .*: run notebook 01 first\."):
        start(books, tmp_path)


def test_a_dead_kernel_is_said(books, tmp_path):
    write_notebook(books, "01_first", "import os; os._exit(9)")
    with pytest.raises(kernel.NotebookFailed, match="01_first stopped: its kernel died"):
        start(books, tmp_path)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (
            PARAMETERS.replace("SEED", "SEEED"),
            r"unknown parameter 'SEEED' in 02_second.ipynb \(did you mean SEED\?\)",
        ),
        (PARAMETERS.replace("SEED = 1\n", ""), "missing parameter 'SEED'"),
        (PARAMETERS + "\nHALF = SEED / 2", "more than NAME = literal lines"),
    ],
)
def test_a_misspelt_parameter_is_refused_before_anything_runs(books, tmp_path, parameters, sentence):
    write_notebook(books, "01_first", f"{log(tmp_path)}('1')")
    write_notebook(books, "02_second", "1", parameters=parameters)
    with pytest.raises(InputError, match=sentence):
        start(books, tmp_path)
    assert not (tmp_path / "log").exists()


def test_exactly_one_parameters_cell(books, tmp_path):
    path = write_notebook(books, "01_first", "1")
    path.write_text(path.read_text().replace('["parameters"]', "[]"))
    with pytest.raises(InputError, match="0 cells tagged parameters"):
        start(books, tmp_path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"wanted": ["04"]}, "unknown notebook '04'"),
        ({"scale": "tinny"}, "unknown scale 'tinny' .*tiny"),
        ({"changes": ["encoder_ctc.stepps=3"]}, "unknown setting of stage encoder_ctc 'stepps' .*steps"),
        ({"changes": ["encoder_ctc.steps=many"]}, "encoder_ctc.steps is 'many', expected int"),
        ({"changes": ["steps=3"]}, "expected stage.field=value"),
        ({"changes": ["encoder_ctc.steps=3"]}, "the notebooks asked for train none"),
        ({"changes": ["encodr.steps=3"]}, "unknown stage 'encodr'"),
        ({"variant": "a/b"}, "no folder name"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_bad_requests_are_one_sentence(books, tmp_path, more, sentence):
    write_notebook(books, "01_first", "1")
    with pytest.raises(UserError, match=sentence):
        start(books, tmp_path, *more.pop("wanted", []), **more)
    assert not list((tmp_path / "runs").glob("*/*")) if (tmp_path / "runs").exists() else True


def test_changes_go_to_the_notebook_of_their_stage(books, tmp_path):
    note = log(tmp_path)
    write_notebook(books, "01_speech_codec", f"{note}(f'{{CHANGES}}\\n')")
    write_notebook(books, "02_encoder_stage1_ctc", f"{note}(f'{{CHANGES}}\\n')")
    start(
        books,
        tmp_path,
        changes=["encoder_ctc.steps=3", "encoder_ctc.schedule=warmup", "codec.learning_rate=1"],
    )
    assert (tmp_path / "log").read_text() == "{'learning_rate': 1.0}\n{'steps': 3, 'schedule': 'warmup'}\n"
    assert (tmp_path / "runs/tiny/encoder_ctc/run.json").is_file()


STAGE = """
import torch
from freeze_omni_lite import notebook
here = notebook.start(SCALE, CHANGES, SEED, RUNS, VARIANT, stage="{stage}")
part = torch.nn.Linear(2, 2)
torch.nn.init.constant_(part.weight, {weight})
torch.nn.init.zeros_(part.bias)
here.save({{"part": part}}, parents=[here.load(name) for name in {parents}], metrics={{"loss": 1.0}})
"""


@pytest.mark.slow
def test_resume_keeps_what_agrees_and_runs_what_does_not(books, tmp_path, capsys):
    def write(ctc: float = 1.0, more: str = "") -> None:
        stage = STAGE.format(stage="encoder_ctc", weight=ctc, parents=[]) + more
        child = STAGE.format(stage="encoder_adapter", weight=2.0, parents=["encoder_ctc"])
        write_notebook(books, "02_encoder_stage1_ctc", stage)
        write_notebook(books, "03_encoder_stage2_adapter", child)
        write_notebook(books, "09_evaluation", "1")

    def again(**more) -> list[bool]:
        capsys.readouterr()
        start(books, tmp_path, resume=True, **more)
        return ["kept" in line for line in capsys.readouterr().out.splitlines()[:3]]

    write()
    assert again() == [False, False, False]
    assert again() == [True, True, True]
    write(more="\n# another source, the same weights")
    assert again() == [False, True, True]
    write(ctc=3.0)
    assert again() == [False, False, False], "children of changed weights run again"
    assert again(seed=2) == [False, False, False]
    assert again(seed=2, changes=["encoder_adapter.steps=3"]) == [True, False, True]
    (tmp_path / "runs/tiny/encoder_ctc/weights.safetensors").write_text("damaged")
    assert again(seed=2, changes=["encoder_adapter.steps=3"])[0] is False


def test_prose_may_change_without_a_new_run(books, tmp_path):
    before = course.Notebook(write_notebook(books, "01_first", "## Idea", "1")).source_hash
    assert course.Notebook(write_notebook(books, "01_first", "## Another", "1")).source_hash == before
    assert course.Notebook(write_notebook(books, "01_first", "## Idea", "2")).source_hash != before


def test_time_left_comes_from_measured_runs_else_from_shares(books, tmp_path):
    for name in ("01_speech_codec", "02_encoder_stage1_ctc", "09_evaluation"):
        write_notebook(books, name, "1")
    chosen = course.select(["all"], books)
    settings = course.Settings("tiny", {}, runs=str(tmp_path))
    progress = run.Progress(chosen, settings, shown=False)
    assert progress.left_seconds() == 0
    progress.finished(chosen[0], 28.0)  # 2 seconds a share
    assert progress.left_seconds() == pytest.approx(28 + 12)
    progress.measured["09_evaluation"] = 50.0
    assert progress.left_seconds() == pytest.approx(28 + 50)


def test_gallery_shows_what_there_is_to_see_and_hear(books, tmp_path):
    pytest.importorskip("nbconvert")
    source = """
import matplotlib.pyplot as plt, numpy as np
from IPython.display import Audio, display
plt.plot([1, 2]); plt.show()
display(Audio(np.zeros(800), rate=8000))
print("word error rate  <half>")
"""
    write_notebook(
        books, "01_first", "print('before')", "## 8. Look and listen", source, "## 9. Check", "print('after')"
    )
    page = start(books, tmp_path).read_text()
    assert "01_first: a made-up notebook" in page and "image/png;base64" in page and "<audio" in page
    assert "word error rate  &lt;half&gt;" in page and "before" not in page and "after" not in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page), "the page needs no network"
    link = re.search(r'href="([^"#]+/notebook.html)"', page)[1]
    assert "before" in (tmp_path / "runs/tiny" / link).read_text()


# ---- ranks and signals -----------------------------------------------------------------------------------------------

TRAIN = """
import os, torch, pathlib
from freeze_omni_lite import ranks
accelerator = ranks.start_ranks()
torch.manual_seed(ranks.rank())
class Stage(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.layer(x).square().mean()
stage = accelerator.prepare(Stage())
optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
for _ in range(3):
    stage(torch.randn(2, 4)).backward()
    optimizer.step()
weights = torch.cat([p.detach().reshape(-1) for p in stage.parameters()])
"""
KEEP = """
of = f"{{ranks.rank()}}-of-{{ranks.world()}}"
pathlib.Path({folder!r}, f"weights{name}-{{of}}").write_bytes(weights.numpy().tobytes())
pathlib.Path({folder!r}, f"pid{name}-{{ranks.rank()}}").write_text(str(os.getpid()))
"""


def program(books: Path, tmp_path: Path) -> str:
    """The command line on another folder of notebooks, as the text of a Python program."""
    words = ["run", "all", "--scale", "tiny", "--device", "cpu", "--runs", str(tmp_path / "runs")]
    return (
        "import sys; from pathlib import Path; from freeze_omni_lite import __main__, run\n"
        f"run.run.__kwdefaults__['notebooks'] = Path({str(books)!r})\n"
        f"sys.exit(__main__.main({words!r}))\n"
    )


def torchrun(books: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """Two ranks on this machine, as the command of the README starts them, on another folder of notebooks."""
    script = tmp_path / "ranks.py"
    script.write_text(program(books, tmp_path))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": str(course.ROOT)}
    return subprocess.run(
        command, env=environment, cwd=course.ROOT, capture_output=True, text=True, timeout=300
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
        if Path("/proc").is_dir()
        else True
    )


def assert_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)], "a kernel was left behind"


def test_two_ranks_train_the_same_weights_notebook_after_notebook(books, tmp_path):
    for name in ("01", "02"):
        write_notebook(books, f"{name}_train", TRAIN + KEEP.format(folder=str(tmp_path), name=name))
    done = torchrun(books, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("01", "02"):
        first, second = (tmp_path / f"weights{name}-{rank}-of-2" for rank in (0, 1))
        assert first.read_bytes() == second.read_bytes()
        assert (tmp_path / f"runs/tiny/{name}_train/notebook.rank1.ipynb").is_file()
    assert done.stdout.count("2 of 2") == 1, "only rank 0 tells"
    assert_gone([int(path.read_text()) for path in tmp_path.glob("pid*")])


def test_one_failing_rank_ends_the_run(books, tmp_path):
    fail = "assert ranks.rank() == 0, 'made to fail'\ntorch.distributed.barrier()"
    write_notebook(books, "01_train", TRAIN + KEEP.format(folder=str(tmp_path), name="01"), fail)
    write_notebook(books, "02_never", f"{log(tmp_path)}('2')")
    begin = time.monotonic()
    done = torchrun(books, tmp_path)
    assert done.returncode != 0 and time.monotonic() - begin < 120
    assert (
        "notebook 01_train, cell 4" in done.stderr
        and "rank 1 failed with AssertionError: made to fail" in done.stderr
    )
    assert not (tmp_path / "log").exists()
    assert_gone([int(path.read_text()) for path in tmp_path.glob("pid*")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_kernel(books, tmp_path, number):
    worker = "import os, subprocess, time; w = subprocess.Popen(['sleep', '600'])\n"
    write_notebook(
        books, "01_first", worker + f"{log(tmp_path)}(f'{{os.getpid()}} {{w.pid}}')\n", "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program(books, tmp_path)],
        cwd=course.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background inherit an ignored SIGINT, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    pids = [int(pid) for pid in (tmp_path / "log").read_text().split()]
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 143), printed
    assert "Traceback" not in printed
    assert_gone(pids)


def test_the_command_line_tells_failures_from_mistakes(books, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run.run.__kwdefaults__, "notebooks", books)
    write_notebook(books, "01_first", "assert 1 == 2, 'one is not two'")
    command = ["run", "all", "--scale", "tiny", "--runs", str(tmp_path / "runs")]
    assert main(command) == 1
    shown = capsys.readouterr().err
    assert "freeze-omni: notebook 01_first, cell 3" in shown and "AssertionError: one is not two" in shown
    assert main([*command, "--set", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_course_names_every_trained_stage_once():
    assert sorted(stage for stage, _ in course.COURSE.values() if stage) == sorted(scales.STAGES)


def test_build_of_an_empty_folder_says_so(tmp_path):
    assert "No notebook has been run" in gallery.build(tmp_path).read_text()
