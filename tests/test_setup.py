"""Set-up files agree with each other, the installation is what they say, and doctor reports it."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from freeze_omni_lite import doctor, parts
from freeze_omni_lite.errors import PartMissing

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def listed() -> list[Requirement]:
    """Every requirement of pyproject.toml but the extra that repeats others."""
    extras = [
        line for name, lines in PROJECT["optional-dependencies"].items() if name != "course" for line in lines
    ]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def test_constraints_are_exact_portable_and_within_the_ranges():
    pinned = {}
    for line in constraints():
        assert re.fullmatch(r"==[\w.]+", str(line.specifier)), f"{line} is not one plain exact version"
        assert line.url is None
        assert not canonicalize_name(line.name).startswith(("nvidia-", "triton")), (
            f"{line.name} exists with CUDA only"
        )
        pinned[canonicalize_name(line.name)] = str(line.specifier).removeprefix("==")
    for requirement in listed():
        exact = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(exact), f"{requirement} does not admit {exact}"


def test_installed_versions_are_the_pinned_ones():
    course = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for line in constraints():
        if canonicalize_name(line.name) in course:
            assert version(line.name).partition("+")[0] == str(line.specifier).removeprefix("=="), line.name


def test_course_is_everything_but_the_better_judge():
    (course,) = PROJECT["optional-dependencies"]["course"]
    assert Requirement(course).extras == set(PROJECT["optional-dependencies"]) - {"course", "judge"}


def test_environment_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *plain, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert plain == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[course]"]}


def test_make_shows_its_two_commands_and_one_stamp():
    """`make -n course` prints the steps without doing them: torch before the rest, the runner, the question."""
    command = ["make", "-n", "course", "VENV=no-such-folder", "QUESTIONS=a.wav", "GPUS=2", "SCALE=paper"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [
        "-c constraints.txt torch",
        '".[course]"',
        "doctor --fix",
        "torchrun --nproc_per_node=2",
        "talk",
        "--out-dir runs/paper/answers",
    ]
    places = [shown.index(step) for step in steps]
    assert places == sorted(places)


def rows(*states: str):
    return lambda: iter([doctor.Row(state, f"part{i}", "found", "do this") for i, state in enumerate(states)])


@pytest.mark.parametrize(("states", "code"), [(("ok", "note"), 0), (("ok", "MISSING", "note"), 2)])
def test_doctor_exit_code(monkeypatch, capsys, states, code):
    monkeypatch.setattr(doctor, "examine", rows(*states))
    assert doctor.main(fix=False) == code
    printed = capsys.readouterr().out
    assert "-> do this" in printed
    assert ("missing: part1" in printed) == (code == 2)


def test_doctor_finds_this_installation_whole(capsys):
    assert doctor.main(fix=False) == 0
    printed = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "threads",
        "torchaudio",
        "SmolLM2",
        "silero-vad",
        "judge",
        "espeak-ng",
        "FLAC",
        "stages",
    ):
        assert name in printed


def test_doctor_names_what_is_missing_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path))
    monkeypatch.setattr(parts, "torchaudio_problem", lambda: "torchaudio was built for CUDA. Run the fix.")
    monkeypatch.setattr(doctor, "vad_row", lambda: 1 / 0)
    doctor.vad_row.__name__ = "vad_row"
    assert doctor.main(fix=False) == 2
    printed = capsys.readouterr().out
    assert "missing: torchaudio, SmolLM2, vad." in printed
    assert "-> torchaudio was built for CUDA. Run the fix." in printed
    assert "audio files" in printed


def test_doctor_reads_wrong_versions():
    assert doctor.unmet("torch>=2") == ""
    assert "expected" in doctor.unmet("torch<1")
    assert "not installed" in doctor.unmet("no-such-package>=1")


def test_fix_goes_on_after_a_failed_download(monkeypatch, capsys):
    def fail():
        raise PartMissing("no network; try again.")

    monkeypatch.setattr(doctor, "mend_torchaudio", lambda: "torchaudio mended")
    monkeypatch.setattr(doctor, "mend_smollm2", fail)
    monkeypatch.setattr(doctor, "examine", rows("ok"))
    assert doctor.main(fix=True) == 0
    printed = capsys.readouterr().out
    assert "torchaudio mended" in printed
    assert "not mended: no network; try again." in printed


def test_fix_brings_the_extension_back_beside_cuda(monkeypatch):
    monkeypatch.setattr(parts, "torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(parts, "restore_torchaudio", lambda: 3)
    assert doctor.mend_torchaudio().startswith("torchaudio: 3 compiled files moved back")
