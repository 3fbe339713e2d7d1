"""export.py: small, in whole chains, whole or not at all; and the options that every verb takes."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from freeze_omni_lite import bench, doctor, export, scales, stages
from freeze_omni_lite.__main__ import main
from freeze_omni_lite.codebook import Codebook
from freeze_omni_lite.encoder import CTCHead, Encoder
from freeze_omni_lite.errors import InputError, StageMismatch, StageMissing

CTC = scales.load("encoder_ctc", "tiny", width=16, layers=1, heads=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path / "cache"))


def save(runs: Path, stage: str, modules: dict[str, nn.Module], parents=(), **more) -> stages.Stage:
    preset = CTC if stage == "encoder_ctc" else scales.load(stage, "tiny")
    return stages.save(stage, preset, modules, runs=runs, parents=parents, **more)


def first(runs: Path, **more) -> stages.Stage:
    modules = {"encoder": Encoder.from_preset(CTC), "ctc_head": CTCHead(16, 5)}
    return save(runs, "encoder_ctc", modules, metrics={"test_cer": 0.1}, seconds=3.5, seed=9, **more)


def second(runs: Path, parent: stages.Stage, **more) -> stages.Stage:
    return save(runs, "encoder_adapter", {"adapter": nn.Linear(8, 8)}, [parent], **more)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two stages, the second trained on the first."""
    second(tmp_path / "runs", first(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def to(tmp_path) -> Path:
    return tmp_path / "shipped" / "tiny"


def shipped(to: Path, name: str) -> stages.Stage:
    return stages.read(to / name, name, "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, its own hidden helpers included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_chain_is_exported_and_restores_strictly(runs, to, capsys):
    rows = export.export("tiny", runs, [], to)
    ctc, adapter = shipped(to, "encoder_ctc"), shipped(to, "encoder_adapter")
    adapter.check_parents(ctc)
    source = stages.load("encoder_ctc", "tiny", runs, quiet=True)
    assert ctc.record["exported"]["from"] == source.sha256 != ctc.sha256
    assert set(ctc.record["exported"]) == {"from", "variant", "dtype", "library_version", "date"}
    kept = ("preset", "changes", "seed", "commit", "seconds", "device", "metrics", "extra", "scale")
    assert {name: ctc.record[name] for name in kept} == {name: source.record[name] for name in kept}

    before, after = Encoder.from_preset(CTC), Encoder.from_preset(CTC)
    source.restore(encoder=before)
    ctc.restore(encoder=after, ctc_head=CTCHead(16, 5))
    mels = torch.randn(1, 32, 80)
    lengths = torch.tensor([32])
    torch.testing.assert_close(before(mels, lengths)[0], after(mels, lengths)[0], atol=0.02, rtol=0)
    assert 0 < rows[0].error < 5e-4 and rows[0].nbytes == export.size_of(to / "encoder_ctc")
    printed = capsys.readouterr().out
    assert "largest relative error" in printed and str(to) not in printed
    assert not list(to.parent.glob(".*")), "the folder beside is gone"


def test_what_stays_in_full_precision(runs, to):
    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.codebook = nn.Linear(3, 4), Codebook(8, 4)
            self.huge = nn.Parameter(torch.full((2, 2), 1e6))
            self.faint = nn.Parameter(torch.full((2, 2), 1e-9))
            self.register_buffer("counts", torch.arange(6).reshape(2, 3))

    save(runs, "codec", {"codec": Codec()})
    export.export("tiny", runs, ["codec", "encoder_ctc"], to)
    weights = load_file(to / "codec" / "weights.safetensors")
    halved = {name for name, tensor in weights.items() if tensor.dtype == torch.float16}
    assert halved == {"codec.line.weight"}, "matrices, and none that fp16 cannot hold"
    assert (
        weights["codec.counts"].dtype == torch.int64 and weights["codec.codebook.seeded"].dtype == torch.bool
    )
    encoder = load_file(to / "encoder_ctc" / "weights.safetensors")
    assert encoder["encoder.normalization.mean"].dtype == torch.float32
    assert export.exported_dtype("token_ctc.blank", torch.randn(8)) == torch.float32
    assert export.exported_dtype("x.normalization.matrix", torch.randn(2, 2)) == torch.float32
    assert export.exported_dtype("x.weight", torch.zeros(2, 2)) == torch.float16


def test_shards_and_sizes(runs, to, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 12_000)
    rows = export.export("tiny", runs, ["encoder_ctc"], to)
    files = shipped(to, "encoder_ctc").files
    assert len(files) == rows[0].files > 1 and max(path.stat().st_size for path in files) <= 12_000
    shipped(to, "encoder_ctc").restore(encoder=Encoder.from_preset(CTC), ctc_head=CTCHead(16, 5))
    before = contents(to.parent)
    monkeypatch.setattr(export, "CHAIN_BYTES", rows[0].nbytes + 100)
    with pytest.raises(
        InputError, match=r"would take .* MB \(encoder_ctc .*, encoder_adapter .*\), expected at"
    ):
        export.export("tiny", runs, ["encoder_adapter"], to)
    monkeypatch.setattr(export, "SHARD_BYTES", 1000)
    with pytest.raises(InputError, match="the size of a shard"):
        export.export("tiny", runs, ["encoder_ctc"], to)
    assert contents(to.parent) == before


def test_one_stage_later_if_its_parents_fit(runs, to):
    with pytest.raises(
        StageMissing, match=r"neither exported with it nor in .*: name encoder_ctc in --stages"
    ):
        export.export("tiny", runs, ["encoder_adapter"], to)
    assert not to.exists()
    export.export("tiny", runs, ["encoder_ctc"], to)
    export.export("tiny", runs, ["encoder_adapter"], to)
    shipped(to, "encoder_adapter").check_parents(shipped(to, "encoder_ctc"))

    retrained = first(runs)
    before = contents(to.parent)
    with pytest.raises(StageMismatch, match=r"encoder_adapter in .* belongs to another encoder_ctc"):
        export.export("tiny", runs, ["encoder_ctc"], to)
    second(runs, retrained)
    with pytest.raises(StageMismatch, match="but the exported encoder_ctc comes from weights"):
        export.export("tiny", runs, ["encoder_adapter"], to)
    assert contents(to.parent) == before
    export.export("tiny", runs, ["encoder_adapter", "encoder_ctc"], to)  # in whichever order they are named
    shipped(to, "encoder_adapter").check_parents(shipped(to, "encoder_ctc"))


def test_a_child_trained_on_the_shipped_parent(runs, to):
    export.export("tiny", runs, ["encoder_ctc"], to)
    second(runs, shipped(to, "encoder_ctc"))
    export.export("tiny", runs, ["encoder_adapter"], to)
    shipped(to, "encoder_adapter").check_parents(shipped(to, "encoder_ctc"))


def test_a_variant_is_shipped_under_its_plain_name(runs, to):
    second(runs, first(runs, variant="long"), variant="long")
    export.export("tiny", runs, ["encoder_adapter@long", "encoder_ctc@long"], to)
    child, parent = shipped(to, "encoder_adapter"), shipped(to, "encoder_ctc")
    child.check_parents(parent)
    assert parent.variant == "" and parent.record["exported"]["variant"] == "long"
    with pytest.raises(StageMismatch, match="was trained on weights"):
        export.export("tiny", runs, ["encoder_adapter@long", "encoder_ctc"], to)
    with pytest.raises(InputError, match="names encoder_ctc twice"):
        export.export("tiny", runs, ["encoder_ctc@long", "encoder_ctc"], to)


@pytest.mark.parametrize("step", ["save_file", "compared", "second swap", "killed"])
def test_a_broken_off_export_leaves_the_old_one(runs, to, monkeypatch, step):
    export.export("tiny", runs, ["encoder_ctc"], to)
    before = contents(to.parent)
    second(runs, first(runs))
    rename = Path.rename

    def fail(*_, **__):
        raise KeyboardInterrupt

    def rename_once(path: Path, target: Path) -> Path:
        if path.parent.name == "new" and path.name == "encoder_adapter":
            fail()
        return rename(path, target)

    with monkeypatch.context() as patch:
        if step in ("save_file", "compared"):
            patch.setattr(export, step, fail)
        else:
            patch.setattr(Path, "rename", rename_once)
        if step == "killed":  # nothing is cleaned up any more
            patch.setattr(export, "clean", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            export.export("tiny", runs, [], to)
    if step == "killed":
        assert contents(to.parent) != before
        with pytest.raises(StageMissing):
            export.export("tiny", runs, ["codec"], to)  # refused before the target is looked at
        with pytest.raises(InputError), monkeypatch.context() as patch:
            patch.setattr(export, "CHAIN_BYTES", 0)
            export.export("tiny", runs, [], to)  # whatever becomes of the next export, it mends first
    assert contents(to.parent) == before
    export.export("tiny", runs, [], to)
    shipped(to, "encoder_adapter").check_parents(shipped(to, "encoder_ctc"))


def test_trained_stages_are_never_overwritten_and_torn_exports_are(runs, to):
    before = contents(runs)
    with pytest.raises(InputError, match="would be overwritten"):
        export.export("tiny", runs, [], runs / "tiny")
    assert contents(runs) == before
    export.export("tiny", runs, [], to)
    (to / "encoder_ctc" / "weights.safetensors").write_bytes(b"torn")
    export.export("tiny", runs, [], to)
    shipped(to, "encoder_adapter").check_parents(shipped(to, "encoder_ctc"))


def test_weights_that_are_no_numbers_are_refused(runs, to):
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.bias, float("nan"))
    save(runs, "codec", {"codec": broken})
    with pytest.raises(StageMismatch, match=r"tensor codec\.bias holds NaN"):
        export.export("tiny", runs, [], to)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--scale tinny", "unknown scale 'tinny'"),
        ("--scale tiny --stages encoder_ctx", "unknown stage 'encoder_ctx'.*did you mean encoder_ctc"),
        ("--scale tiny --stages encoder_ctc,", "unknown stage ''"),
        ("--scale tiny --stages codec", "stage 'codec' at scale 'tiny' not found"),
        ("--scale gpu", "at scale 'gpu' not found"),
        ("--scale tiny --to {runs}/tiny", "would be overwritten"),
        ("--scale tiny --to {runs}/tiny/encoder_ctc/stage.json/x", "cannot be written"),
        ("--scale tiny --seed x", "--seed is 'x'"),
        ("--scale tiny --device abacus", "device 'abacus' is not available"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, runs, to, capsys):
    before = contents(runs)
    words = f"export --runs {runs} --to {to} {options.format(runs=runs)}".split()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(sentence, lines[0]), lines
    assert contents(runs) == before and not to.exists()


def test_the_verb_exports(runs, to, capsys):
    assert main(f"export --scale tiny --runs {runs} --to {to} --stages encoder_ctc --device cpu".split()) == 0
    assert capsys.readouterr().out.startswith("encoder_ctc ")
    assert main(f"export --scale tiny --runs {runs} --to {to} --seed 3".split()) == 0
    assert {path.name for path in to.iterdir()} == {"encoder_ctc", "encoder_adapter"}


# ---- --device and --seed of doctor and bench -------------------------------------------------------------------------


def test_doctor_takes_device_and_seed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: iter([]))
    assert main(["doctor", "--device", "cpu", "--seed", "2"]) == 0
    assert "cpu, as asked for" in capsys.readouterr().out
    assert main(["doctor", "--device", "abacus"]) == 2
    printed = capsys.readouterr().out
    assert "-> device 'abacus' is not available" in printed and "missing: device." in printed


def test_bench_takes_device_and_seed(tmp_path, monkeypatch, capsys):
    drawn = []

    def draws() -> list[bench.Stream]:
        drawn.append(torch.randn(1).item())
        return [bench.features_stream()]

    monkeypatch.setitem(bench.BENCHES, "streams", draws)
    monkeypatch.setattr(bench, "WARM_UP", 1)
    for seed in (5, 5, 6):
        assert main(f"bench --device cpu --seed {seed} -o {tmp_path}/b.json".split()) == 0
    assert drawn[0] == drawn[1] != drawn[2]
    stored = json.loads((tmp_path / "b.json").read_text())
    assert (stored["device"], stored["seed"]) == ("cpu", 6)
    assert main(["bench", "--device", "abacus"]) == 2
    assert "device 'abacus' is not available" in capsys.readouterr().err
