"""stages.py: whole or not at all, strict both ways, and never a mixed chain."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from freeze_omni_lite import files, scales, stages
from freeze_omni_lite.errors import InputError, StageMismatch, StageMissing

PRESET = scales.load("encoder_ctc", "tiny", width=32)


class Part(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.line = nn.Linear(2, width)
        self.tied = self.line
        self.register_buffer("mean", torch.zeros(width))


def save(tmp_path, part=None, **more):
    """A stage with two parts in tmp_path."""
    settings = dict(
        metrics={"cer": 0.5, "judge": "not measured: no judge", "by_voice": {"a": torch.tensor(1.0)}}
    )
    modules = {"encoder": part or Part(), "ctc_head": nn.Linear(3, 2)}
    return stages.save("encoder_ctc", PRESET, modules, runs=tmp_path, **(settings | more))


def test_saved_and_restored(tmp_path, capsys):
    part = Part()
    saved = save(tmp_path, part, seed=7, seconds=12.3, extra={"units": "abc"}, source_hash="f00")
    assert saved.folder == tmp_path / "tiny" / "encoder_ctc"
    found, other = stages.load("encoder_ctc", "tiny", runs=tmp_path), Part()
    found.restore(encoder=other)
    assert all(
        torch.equal(a, b)
        for a, b in zip(part.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert found.preset.values() == PRESET.values() and found.preset.width == 32
    assert found.metrics == {"cer": 0.5, "judge": "not measured: no judge", "by_voice": {"a": 1.0}}
    assert found.extra == {"units": "abc"} and found.record["source_hash"] == "f00"
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "seed 7, 12 s on" in line and found.sha256[:8] in line
    assert str(tmp_path) not in (saved.folder / "stage.json").read_text()


def test_missing_stage_says_how_to_get_it(tmp_path):
    with pytest.raises(StageMissing) as error:
        stages.load("encoder_ctc", "tiny", runs=tmp_path / "runs")
    assert str(error.value).endswith(
        "runs/tiny. Run notebook 02 first, or `freeze-omni run 02 --scale tiny`."
    ) and str(error.value).startswith("stage 'encoder_ctc' at scale 'tiny' not found in ")
    with pytest.raises(InputError, match="did you mean encoder_ctc"):
        stages.load("encoder_ctx", "tiny", runs=tmp_path)


def test_variants_are_stages_beside_each_other(tmp_path):
    save(tmp_path, variant="seed2", seed=2)
    assert stages.load("encoder_ctc", "tiny", tmp_path, variant="seed2").full_name == "encoder_ctc@seed2"
    with pytest.raises(StageMissing):
        stages.load("encoder_ctc", "tiny", tmp_path)


@pytest.mark.parametrize(
    "module, sentence",
    [
        (Part(4), r"tensor encoder\.line\.bias is \(3,\) there, expected \(4,\)"),
        (nn.Linear(2, 3), r"tensor encoder\.bias is missing there, expected \(3,\)"),
    ],
)
def test_strict_about_names_and_shapes(tmp_path, module, sentence):
    stage = save(tmp_path)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(StageMismatch, match=sentence):
        stage.restore(ctc_head=nn.Linear(3, 2), encoder=module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_strict_about_tensors_that_nobody_takes(tmp_path):
    class Less(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 3)
            self.tied = self.line

    with pytest.raises(StageMismatch, match=r"encoder\.mean is \(3,\) there, expected missing"):
        save(tmp_path).restore(encoder=Less())


@pytest.mark.parametrize("failing", ["save_file", "atomic_write_json"])
def test_a_failed_save_is_noticed_or_leaves_the_old_stage(tmp_path, monkeypatch, failing):
    old = save(tmp_path, seed=1)

    def fail(*args, **kwargs):
        if failing == "save_file":
            args[1].write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages, failing, fail)
        with pytest.raises((InputError, OSError), match="no space left"):
            save(tmp_path, seed=2)
    assert (
        not list(old.folder.glob(".*")) and json.loads((old.folder / "stage.json").read_text())["seed"] == 1
    )
    if failing == "save_file":
        assert stages.load("encoder_ctc", "tiny", tmp_path).sha256 == old.sha256
    else:  # new weights, old record: refused rather than believed
        with pytest.raises(StageMismatch, match="interrupted save"):
            stages.load("encoder_ctc", "tiny", tmp_path)


def test_metrics_are_finite(tmp_path):
    with pytest.raises(AssertionError, match="finite"):
        save(tmp_path, metrics={"cer": float("nan")})
    assert not (tmp_path / "tiny").exists()


def test_saving_ends_the_resume_file(tmp_path):
    place = stages.folder("encoder_ctc", "tiny", tmp_path)
    files.atomic_write_bytes(place / "resume.pt", b"x")
    save(tmp_path)
    assert not (place / "resume.pt").exists()


def child_of(parent, tmp_path):
    preset = scales.load("encoder_adapter", "tiny")
    return stages.save(
        "encoder_adapter", preset, {"adapter": nn.Linear(1, 1)}, runs=tmp_path, parents=[parent]
    )


def test_parents_are_known_by_their_weights(tmp_path):
    parent = save(tmp_path)
    child = child_of(parent, tmp_path)
    assert child.record["parents"] == {"encoder_ctc": parent.sha256}
    child.check_parents(parent)
    retrained = save(tmp_path)  # other random weights
    with pytest.raises(
        StageMismatch, match=r"trained on weights .* Train encoder_adapter again: .*run 03 --scale tiny"
    ):
        child.check_parents(retrained)
    with pytest.raises(StageMismatch, match="was trained on other stages of encoder_adapter"):
        parent.check_parents(child)


def test_a_source_never_mixes_and_never_takes_a_stale_chain(tmp_path, capsys):
    child_of(save(tmp_path), tmp_path)
    chain = stages.source(["encoder_ctc", "encoder_adapter"], tmp_path)
    assert [chain.stage(name).name for name in chain.needs] == ["encoder_ctc", "encoder_adapter"]
    assert [preset.stage for preset in chain.presets()] == ["encoder_ctc", "encoder_adapter"]
    assert chain.provenance()["encoder_ctc"]["scale"] == "tiny" and "stages from" in capsys.readouterr().err
    save(tmp_path)
    stale = stages.source(["encoder_ctc", "encoder_adapter"], tmp_path)
    with pytest.raises(StageMismatch):
        list(stale.presets())
    with pytest.raises(StageMissing, match="'codec' at scale 'tiny'"):
        stages.source(["encoder_ctc", "codec"], tmp_path, "tiny")


def test_the_best_there_is(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(stages, "root", lambda: tmp_path)
    save("runs")
    assert stages.find("encoder_ctc").scale == "tiny"
    laptop = scales.load("encoder_ctc", "laptop")
    stages.save("encoder_ctc", laptop, {"encoder": Part()}, runs="data_samples/stages")
    assert stages.find("encoder_ctc").folder.parts[-4] == "data_samples"
    assert (
        stages.load("encoder_ctc", "laptop").folder.parts[-4] == "data_samples"
    )  # nothing of ours at this scale
    stages.save("encoder_ctc", laptop, {"encoder": Part()}, runs="runs")
    assert stages.find("encoder_ctc").folder.parts[-3:] == ("runs", "laptop", "encoder_ctc")
    assert stages.find("encoder_ctc", scale="tiny").scale == "tiny"


def test_half_precision_shards_restore_as_float32(tmp_path):
    part = Part()
    stage = save(tmp_path, part)
    state = {f"encoder.{name}": tensor.half().clone() for name, tensor in part.state_dict().items()}
    names = sorted(state)
    for number, group in enumerate((names[:2], names[2:]), start=1):
        save_file(
            {name: state[name] for name in group}, stage.folder / f"weights-0000{number}-of-00002.safetensors"
        )
    (stage.folder / "weights.safetensors").unlink()
    shards = stages.Stage(stage.folder, stage.record)
    record = stage.record | {"weights_sha256": shards.sha256}
    files.atomic_write_json(stage.folder / "stage.json", record)
    other = Part()
    stages.load("encoder_ctc", "tiny", tmp_path).restore(encoder=other)
    assert other.line.weight.dtype == torch.float32
    torch.testing.assert_close(other.line.weight, part.line.weight, atol=1e-3, rtol=0)
    (stage.folder / "weights-00002-of-00002.safetensors").unlink()
    with pytest.raises(StageMismatch, match="holds 1 of 2 weight files"):
        stages.load("encoder_ctc", "tiny", tmp_path)


def test_saved_values_outlive_edits_of_scales(tmp_path, monkeypatch):
    stage = save(tmp_path)
    edited = dict(scales.STAGES["encoder_ctc"])
    edited["layers"] = (9, 9, 9, 9, "ours", "")  # a preset edited later
    edited["brand_new"] = (5, 5, 5, 5, "ours", "")  # a setting gained
    del edited["heads"]  # a setting lost
    monkeypatch.setitem(scales.STAGES, "encoder_ctc", edited)
    preset = stages.Stage(stage.folder, stage.record).preset
    assert (preset.layers, preset.brand_new, preset.heads, preset.width) == (2, 5, 2, 32)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_record_is_one_sentence(tmp_path, text):
    stage = save(tmp_path)
    (stage.folder / "stage.json").write_text(text)
    with pytest.raises(StageMismatch, match="is damaged"):
        stages.load("encoder_ctc", "tiny", tmp_path)


def test_a_renamed_folder_is_refused(tmp_path):
    save(tmp_path).folder.rename(tmp_path / "tiny" / "codec")
    with pytest.raises(StageMismatch, match="holds stage 'encoder_ctc' at scale 'tiny', expected 'codec'"):
        stages.load("codec", "tiny", tmp_path)


def test_every_stage_has_its_notebook():
    assert set(stages.NOTEBOOK_OF) == set(scales.STAGES)
