"""Studies: arms that a notebook really runs, short at every scale, kept when they agree, published when complete."""

import json
from pathlib import Path

import pytest
import torch
from test_run import write_notebook
from torch import nn

from freeze_omni_lite import adapter, course, notebook, results, scales, stages, study, training
from freeze_omni_lite.__main__ import main
from freeze_omni_lite.errors import InputError, StageMismatch
from freeze_omni_lite.kernel import NotebookFailed
from freeze_omni_lite.study import Arm, Result, Share, Study

NOTEBOOK = """
import json, pathlib, torch
from freeze_omni_lite import notebook
here = notebook.start(SCALE, CHANGES, SEED, RUNS, VARIANT, stage="encoder_ctc")
assert here.preset.chunk_frames < 8 or not pathlib.Path({flag!r}).exists(), "this arm fails"
here.folder.mkdir(parents=True, exist_ok=True)
rows = [{{"step": n, "loss": 1 / n, "seconds": 2.0 * n}} for n in (1, 2, 3)]
(here.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
size = here.preset.chunk_frames
metrics = {{"test_cer": 0.1 * size, "cer_percent_by_chunk": {{"40 ms": 2.0 * size, "whole": 1.0}}}}
here.save({{"part": torch.nn.Linear(2, 2)}}, metrics=metrics, seconds=6.0)
"""
TWO = Study(
    "Which size?",
    ("02",),
    (Arm("4", {"encoder_ctc.chunk_frames": 4}), Arm("8", {"encoder_ctc.chunk_frames": 8}, seed=1)),
    {"encoder_ctc.steps": Share(0.5, least=3)},
    (Result("CER (%)", "encoder_ctc.test_cer", 100), Result("by chunk", "encoder_ctc.cer_percent_by_chunk")),
    {"loss": "encoder_ctc.loss"},
)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A study of two arms on a made-up notebook, results published into a folder of the test."""
    monkeypatch.setitem(study.STUDIES, "two", TWO)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    write_notebook(tmp_path / "books", "02_encoder_stage1_ctc", NOTEBOOK.format(flag=str(tmp_path / "flag")))
    runs = str(tmp_path / "runs")
    return lambda **more: study.run_study("two", "tiny", runs=runs, notebooks=tmp_path / "books", **more)


def test_a_study_runs_keeps_what_it_has_and_is_published_and_drawn(two, tmp_path, capsys):
    assert study.figure("two").startswith("Study two is not measured yet: `freeze-omni study two`")
    (tmp_path / "flag").touch()
    with pytest.raises(NotebookFailed, match=r"1 of 2 arms of study two failed, the first: .*this arm fails"):
        two()
    place = tmp_path / "runs/tiny/studies/two.json"
    first, failed = json.loads(place.read_text())["arms"]
    assert "AssertionError" in failed["failed"] and "results" not in failed
    with pytest.raises(InputError, match="1 of 2 arms, arm 8 is missing: finish it with freeze-omni study"):
        study.publish("two", "tiny", str(tmp_path / "runs"))

    (tmp_path / "flag").unlink()
    capsys.readouterr()
    assert two() == place
    printed = capsys.readouterr().out
    assert (
        printed.count("kept") == 1
        and "arm 2 of 2: 8 (encoder_ctc.steps=120, encoder_ctc.chunk_frames=8)" in printed
    )
    record = json.loads(place.read_text())
    again, second = record["arms"]
    assert again == first and first["results"] == {"CER (%)": 40.0, "by chunk": {"40 ms": 8.0, "whole": 1.0}}
    assert (first["seed"], second["seed"], second["variant"]) == (1, 2, "two-8")
    assert second["changes"] == {"encoder_ctc.steps": 120, "encoder_ctc.chunk_frames": 8}
    assert second["curves"]["loss"]["seconds"] == [2.0, 4.0, 6.0] and second["curves"]["loss"]["step"] == [
        1,
        2,
        3,
    ]
    assert {"date", "commit", "command", "cpu", "threads"} <= record.keys()
    assert (
        record["command"] == "freeze-omni study two --scale tiny" and str(tmp_path) not in place.read_text()
    )

    assert study.publish("two", "tiny", str(tmp_path / "runs")) == tmp_path / "results/study_two.json"
    assert "2 arms at tiny, at most 0.1 min" in study.figure("two")
    titles = [ax.get_title(loc="left") for ax in study.draw(record)]
    assert titles == [
        "CER (%): from 40 (4) to 80 (8)",
        "by chunk, by arm",
        "loss: arm 4 ends lowest, at 0.333",
    ]


def test_every_arm_is_a_request_that_run_accepts(tmp_path):
    for name, one in study.STUDIES.items():
        chosen = course.select(list(one.notebooks))
        trained = {notebook.stage for notebook in chosen}
        for scale in scales.SCALES:
            for arm in one.arms:
                options = study.as_options(study.changes_of(one, arm, scale, {}))
                assert set(course.parse_changes(options, scale, chosen)) <= trained
        places = [result.place for result in one.results] + list(one.curves.values())
        assert {place.split(".")[0] for place in places} <= trained
        variants = [study.variant_of(name, arm) for arm in one.arms]
        assert len(set(variants)) == len(variants) >= 2


def test_the_metrics_that_studies_read_are_saved_by_their_notebooks():
    for one in study.STUDIES.values():
        books = {book.stage: json.dumps(book.cells) for book in course.select(list(one.notebooks))}
        for result in one.results:
            stage, metric, *_ = result.place.split(".")
            assert f'\\"{metric}\\": ' in books[stage], result.place


def test_what_no_judge_could_measure_is_said_and_not_drawn():
    records = {"codec": {"metrics": {"cer": None, "loss": 1.5}}}
    missing, nested, there = (Result("x", f"codec.{place}", 100) for place in ("cer", "cer.by.k", "loss"))
    assert study.value_at(records, missing) is None and study.value_at(records, nested) is None
    assert study.value_at(records, there) == 150.0
    arm = {"name": "a", "results": {"CER": None, "loss": 1.0}, "training_seconds": {"codec": 60}}
    assert study.cells(arm) == {"CER": "not measured", "loss": "1", "training (min)": "1"}
    arms = [arm | {"changes": {}, "curves": {}}, arm | {"name": "b", "changes": {"c": 1}, "curves": {}}]
    axes = study.draw({"arms": arms, "what": "study_x", "clock": "step"})
    assert [ax.get_title(loc="left") for ax in axes] == ["loss: from 1 (a) to 1 (a)"]


def test_arms_are_never_longer_than_the_preset():
    share = Share(0.3, least=240)
    assert [share.of(steps) for steps in (6, 240, 2000)] == [6, 240, 600]
    assert Share(0.5, least=8).of(48.0) == 24.0 and isinstance(Share(0.5, least=8).of(8.0), float)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["chunck"], "unknown study 'chunck' (did you mean chunk?): use one of chunk"),
        ([], "study needs a name: give one of chunk"),
        (["chunk", "--set", "encoder_ctc.chunk_frames=2"], "--set names encoder_ctc.chunk_frames, in which"),
        (["chunk", "--set", "encoder_ctc.stepps=2"], "did you mean steps"),
        (["chunk", "--set", "codec.steps=2"], "the notebooks asked for train encoder_ctc: add its notebook"),
        (["chunk", "--publish"], "study chunk at scale tiny has 0 of 5 arms, arm 1 is missing"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(study, "run", lambda *_, **__: pytest.fail("an arm was about to run"))
    assert main(["study", *words, "--scale", "tiny", "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_what_the_user_sets_wins_over_what_arms_share():
    wanted = {"encoder_ctc": {"steps": 5, "width": 32}}
    changes = study.changes_of(TWO, TWO.arms[0], "tiny", wanted)
    assert changes == {"encoder_ctc.steps": 5, "encoder_ctc.chunk_frames": 4, "encoder_ctc.width": 32}


def test_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start freeze-omni study without torchrun"):
        study.run_study("chunk", "tiny")


def test_curves_over_seconds_end_where_the_shortest_arm_ends():
    slow = {"step": [1, 2], "seconds": [1.0, 3.0], "value": [3.0, 2.0]}
    late = {"step": [8, 9], "seconds": [4.0, 5.0], "value": [2.0, 1.0]}  # its first number comes too late
    arms = [
        {"name": name, "results": {}, "curves": {"loss": curve}} for name, curve in (("a", slow), ("b", late))
    ]
    (ax,) = study.draw({"what": "study_x", "arms": arms, "clock": "seconds"})
    assert [list(line.get_xdata()) for line in ax.get_lines()] == [[1.0, 3.0], []]
    assert ax.get_xlabel() == "training, up to 3 s" and "arm a ends lowest, at 2" in ax.get_title(loc="left")


def test_the_table_has_a_line_a_number_and_a_column_an_arm():
    found = {
        "results": {"CER (%)": 12.345, "by chunk": {"40 ms": 9.0}},
        "training_seconds": {"a": 60, "b": 30},
    }
    lines = study.table({"arms": [{"name": "4"} | found, {"name": "8", "failed": "why"}]}).splitlines()
    assert [line.split() for line in lines] == [
        ["4", "8"],
        ["CER", "(%)", "12.3", "failed"],
        ["by", "chunk:", "40", "ms", "9", "failed"],
        ["training", "(min)", "1.5", "failed"],
    ]


def test_list_tells_every_arm(capsys):
    assert main(["study", "--list", "--scale", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in study.STUDIES) and "seed + 2" in printed


def test_seeds_are_summed_up_as_a_spread():
    arms = [{"changes": {}}, {"changes": {}}, {"changes": {}}]
    title = study.title_of("CER (%)", {"1": 10.0, "2": 12.0, "3": 14.0}, arms)
    assert title == "CER (%): 12, standard deviation 2 over 3 seeds"


def test_published_studies_are_those_defined():
    for path in results.FOLDER.glob("study_*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        one = study.STUDIES[path.stem.removeprefix("study_")]
        assert [arm["name"] for arm in record["arms"]] == [arm.name for arm in one.arms]
        assert all(
            arm["results"].keys() == {result.label for result in one.results} for arm in record["arms"]
        )


# ---- what arms rest on: parents of variants, no prompts --------------------------------------------------------------


def trained(runs: Path, stage: str, variant: str = "", parents: list[str] | None = None, value: float = 0.0):
    """Save a stage as its notebook would: through the context, with the parents that it finds."""
    here = notebook.start("tiny", {}, 1, str(runs), variant, stage=stage)
    found = [here.load(name) for name in parents or []]
    part = nn.Linear(2, 2)
    nn.init.constant_(part.weight, value)
    return here.save({"part": part}, parents=found, metrics={})


def test_a_variant_grows_from_its_own_parent_else_from_the_plain_one(tmp_path, capsys):
    plain = trained(tmp_path, "encoder_ctc")
    child = trained(tmp_path, "encoder_adapter", "v", ["encoder_ctc"], value=1.0)
    assert child.record["parents"] == {"encoder_ctc": plain.sha256}
    assert "no encoder_ctc@v: this variant grows from the plain encoder_ctc" in capsys.readouterr().out
    settings = course.Settings("tiny", {}, runs=str(tmp_path), variant="v")
    assert course.stage_stands(child.folder, "encoder_adapter", settings)

    own = trained(tmp_path, "encoder_ctc", "v", value=2.0)
    assert not course.stage_stands(child.folder, "encoder_adapter", settings), (
        "it has a parent of its own now"
    )
    child = trained(tmp_path, "encoder_adapter", "v", ["encoder_ctc"], value=3.0)
    assert child.record["parents"] == {"encoder_ctc@v": own.sha256}
    assert course.stage_stands(child.folder, "encoder_adapter", settings)


def test_stages_of_several_variants_are_never_mixed(tmp_path):
    trained(tmp_path, "encoder_adapter")
    trained(tmp_path, "encoder_prompt", parents=["encoder_adapter"])
    trained(tmp_path, "encoder_prompt", "v", ["encoder_adapter"], value=1.0)
    loads = ["encoder_adapter", "encoder_prompt"]
    trained(tmp_path, "duplex", "v", loads)  # a prompt of its own on the plain adapter: one chain
    trained(tmp_path, "encoder_adapter", "v", value=2.0)
    with pytest.raises(StageMismatch, match=r"was trained on other stages of encoder_adapter@v"):
        trained(tmp_path, "duplex", "v", loads)


def test_no_prompt_embedding_at_all_can_be_trained_beside_a_head_and_saved(tmp_path):
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt_embedding = adapter.PromptEmbedding(0, 3, torch.randn(5, 3), torch.Generator())
            self.state_head = nn.Linear(3, 2)

        def forward(self, batch):
            rows = torch.cat([self.prompt_embedding()[0], batch["x"]])
            return {"loss": self.state_head(rows).square().mean()}

    part, preset = Part(), scales.load("encoder_prompt", "tiny", prompt_embeddings=0, steps=2)
    assert part.prompt_embedding(4).shape == (4, 0, 3)
    training.fit(part, lambda *_: {"x": torch.ones(2, 3)}, preset, tmp_path / "fit")
    assert training.counts(part) == [("state_head", 8, 0)]
    modules = dict(part.named_children())
    saved = stages.save("encoder_prompt", preset, modules, runs=tmp_path)
    other = Part()
    saved.restore(prompt_embedding=other.prompt_embedding, state_head=other.state_head)
    assert training.fingerprint(other) == training.fingerprint(part)
