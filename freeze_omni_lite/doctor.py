"""`freeze-omni doctor`: what is installed, what would be used, and what to do about what is missing.

Exit code 0 when nothing essential is missing, else 2. With --fix it mends torchaudio and fetches SmolLM2 first.
"""

import importlib.metadata
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from . import __version__, parts
from .errors import InputError, PartMissing
from .threads import thread_count

ROOT = Path(__file__).resolve().parent.parent
OK, NOTE, MISSING = "ok", "note", "MISSING"
FORMATS = ("WAV", "FLAC", "OGG", "MP3", "AIFF")  # the common ones, to keep the line short
IMPORT_FAILS = "Run `make course` again; if it stays, delete .venv first."


@dataclass
class Row:
    """One line of the table: ok, note (something optional is not there) or MISSING (something essential)."""

    state: str
    name: str
    found: str
    remedy: str = ""

    def show(self) -> str:
        line = f"  {self.state:<8} {self.name:<16} {self.found}"
        return f"{line}\n{'':<28}-> {self.remedy}" if self.remedy else line


def main(fix: bool = False, device: str | None = None) -> int:
    """Print the table. Returns 0, or 2 if something essential is missing, such as the wanted `device`."""
    if fix:
        mend()
    print(f"freeze_omni_lite {__version__} in {ROOT}")
    rows = []
    for row in chain(examine(), device_rows(device)):
        print(row.show(), flush=True)
        rows.append(row)
    missing = [row.name for row in rows if row.state == MISSING]
    if missing:
        print(f"{len(missing)} essential parts are missing: {', '.join(missing)}.")
        return 2
    print("Nothing essential is missing.")
    return 0


def mend() -> None:
    """What can be mended without a person: torchaudio's extension files, the language model."""
    for step in (mend_torchaudio, mend_smollm2):
        try:
            message = step()
        except PartMissing as error:
            message = f"not mended: {error}"
        if message:
            print(message, flush=True)


def mend_torchaudio() -> str:
    """Set the CUDA extension aside, or bring it back beside a CUDA torch that came later. Returns a message or ""."""
    if parts.torchaudio_folder() is None or parts.torch_is_cpu_only():
        return parts.ensure_torchaudio(mend=True)
    back = parts.restore_torchaudio()
    return f"torchaudio: {back} compiled files moved back, since this torch has CUDA." if back else ""


def mend_smollm2() -> str:
    """Fetch and convert the language model if it is not cached. Returns a message or ""."""
    if parts.smollm2_cached():
        return ""
    return f"{parts.SMOLLM2} is now in {parts.smollm2_folder()}"


def examine() -> Iterator[Row]:
    """Every line of the table, in the order in which a person would mend them."""
    yield python_row()
    yield from package_rows()
    for look in (
        torch_row,
        threads_row,
        torchaudio_row,
        smollm2_row,
        vad_row,
        judge_row,
        espeak_row,
        formats_row,
    ):
        try:
            yield look()
        except Exception as error:  # a broken installation must not stop the table
            name = look.__name__.removesuffix("_row")
            yield Row(MISSING, name, f"fails: {type(error).__name__}: {first_line(error)}", IMPORT_FAILS)
    yield from extra_rows()
    yield from stage_rows()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def python_row() -> Row:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Row(OK, "python", found)


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """(core requirements, extras) as written in the checkout's pyproject.toml, else in the installed metadata."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return table["dependencies"], table["optional-dependencies"]
    core, extras = [], {}
    for line in importlib.metadata.requires("freeze-omni-lite") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        (extras.setdefault(extra[1], []) if extra else core).append(requirement.strip())
    return core, extras


def unmet(requirement: str) -> str:
    """What is wrong with one requirement in this environment, "" if nothing."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    found = parts.version(wanted.name)
    if not found:
        return f"{wanted.name} is not installed"
    if wanted.specifier and not wanted.specifier.contains(found, prereleases=True):
        return f"{wanted.name} {found} is installed, {wanted.specifier} expected"
    return ""


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]


def package_rows() -> Iterator[Row]:
    """One line for all core libraries that are fine, one for each that is not."""
    core, _ = requirements()
    problems = {requirement: unmet(requirement) for requirement in core}
    fine = [name_of(requirement) for requirement, problem in problems.items() if not problem]
    yield Row(OK, "libraries", ", ".join(f"{name} {parts.version(name)}" for name in fine))
    for requirement, problem in problems.items():
        if problem:
            yield Row(
                MISSING,
                name_of(requirement),
                problem,
                "`pip install -c constraints.txt -e .` in the checkout.",
            )


def torch_row() -> Row:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Row(OK, "torch", f"{torch.__version__}, {len(names)} GPU(s): {', '.join(sorted(set(names)))}")
    if torch.backends.mps.is_available():
        return Row(OK, "torch", f"{torch.__version__}, CPU and Apple GPU (mps)")
    kind = "CPU build" if parts.torch_is_cpu_only() else f"CUDA {torch.version.cuda} build, but no GPU here"
    return Row(OK, "torch", f"{torch.__version__}, {kind}: everything runs on the CPU")


def device_rows(wanted: str | None = None) -> Iterator[Row]:
    """The device that the verbs would use, or that `wanted` is not there; nothing where torch itself is broken."""
    try:
        from .ranks import device

        yield Row(OK, "device", f"{device(wanted)}, {'as asked for' if wanted else 'the best that is there'}")
    except InputError as error:
        yield Row(MISSING, "device", f"{wanted or os.environ.get('FREEZE_OMNI_DEVICE')}", str(error))
    except Exception:  # the row of torch has said it
        return


def threads_row() -> Row:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = " (FREEZE_OMNI_THREADS)" if os.environ.get("FREEZE_OMNI_THREADS") else ""
    return Row(OK, "threads", f"{thread_count()} a process{chosen}, {os.cpu_count()} cores, {ranks} rank(s)")


def torchaudio_row() -> Row:
    problem = parts.torchaudio_problem()
    if problem:
        return Row(MISSING, "torchaudio", f"{parts.version('torchaudio')} cannot be imported", problem)
    import torchaudio  # noqa: F401  (the real proof)

    align = (
        "with forced alignment"
        if parts.has_forced_align()
        else "compiled extension set aside: no forced alignment"
    )
    return Row(OK, "torchaudio", f"{parts.version('torchaudio')}, {align}")


def smollm2_row() -> Row:
    folder = parts.smollm2_cached()
    if folder:
        return Row(OK, "SmolLM2", str(folder))
    remedy = (
        "`freeze-omni doctor --fix` fetches it (93 MB, once). At full scale another model takes its place."
    )
    return Row(MISSING, "SmolLM2", f"not in {parts.cache_dir()}", remedy)


def vad_row() -> Row:
    from silero_vad import load_silero_vad

    load_silero_vad()
    return Row(OK, "silero-vad", f"{parts.version('silero-vad')}, weights in the package")


def judge_row() -> Row:
    """Which judges are there, and which one metrics would use."""
    there = [name for name in ("pocketsphinx", "faster_whisper") if parts.installed(name)]
    used = parts.judge()
    if used is None:
        return Row(NOTE, "judge", "none, so intelligibility is not measured", "`pip install -e '.[eval]'`.")
    remedy = ""
    if used == "pocketsphinx":
        remedy = "a better judge: `pip install -e '.[judge]'` and FREEZE_OMNI_JUDGE=model name or folder."
    return Row(OK, "judge", f"would use {used} (installed: {', '.join(there)})", remedy)


def espeak_row() -> Row:
    library = parts.espeak_library()
    if library is None:
        return Row(
            NOTE, "espeak-ng", "not installed: no new questions can be spoken", "`pip install -e '.[data]'`."
        )
    return Row(
        OK, "espeak-ng", f"{library.name} of espeakng-loader {parts.version('espeakng-loader')} (GPL-3 tool)"
    )


def formats_row() -> Row:
    import soundfile

    formats = [name for name in FORMATS if name in soundfile.available_formats()]
    return Row(
        OK, "audio files", f"{', '.join(formats)} through soundfile {soundfile.__version__}, no ffmpeg needed"
    )


def extra_rows() -> Iterator[Row]:
    """The optional groups of packages, one line each; `course` only repeats them."""
    _, extras = requirements()
    for extra, packages in extras.items():
        problems = [
            problem for problem in map(unmet, packages) if problem and "freeze-omni-lite" not in problem
        ]
        if problems:
            yield Row(
                NOTE, f"[{extra}]", "; ".join(problems), f"`pip install -c constraints.txt -e '.[{extra}]'`."
            )
        elif extra != "course":
            names = ", ".join(f"{name_of(package)} {parts.version(name_of(package))}" for package in packages)
            yield Row(OK, f"[{extra}]", names)


def stage_rows() -> Iterator[Row]:
    """The trained stages that a verb without --scale could take."""
    places = {
        f"runs/{folder.name}": folder for folder in sorted((ROOT / "runs").glob("*")) if folder.is_dir()
    }
    places["shipped laptop"] = ROOT / "data_samples" / "stages" / "laptop"
    stages = {
        place: sorted(file.parent.name for file in folder.glob("*/stage.json"))
        for place, folder in places.items()
    }
    found = [f"{place}: {', '.join(names)}" for place, names in stages.items() if names]
    if found:
        yield from (Row(OK, "stages", line) for line in found)
    else:
        yield Row(
            NOTE,
            "stages",
            "none trained yet",
            "`freeze-omni run all --scale tiny` (under 6 minutes on 2 cores).",
        )
