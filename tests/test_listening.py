"""Every part of the listening measure on random parts: batched equals one by one, counts add up, gaps are said."""

import dataclasses

import pytest
import test_dialogue
import torch

from freeze_omni_lite import audio, evaluation, listening, measure, verbs
from freeze_omni_lite.decisions import Decision, Outcome
from freeze_omni_lite.duplex import DialogueState, Timeline
from freeze_omni_lite.fingerprint import digest
from freeze_omni_lite.scenes import Made, plan_scenes


@pytest.fixture(scope="module")
def system():
    return test_dialogue.RandomSystem()


@pytest.fixture
def no_voices(monkeypatch):
    """Every utterance is the same 1.6 s of noise."""
    voiced = lambda plan, progress: [dataclasses.replace(u, duration_seconds=1.6) for u in plan]  # noqa: E731
    monkeypatch.setattr(listening, "synthesize", voiced)
    monkeypatch.setattr(listening, "synthesize_scenes", lambda plan, progress: plan)
    made = Made(test_dialogue.recording(), Timeline(1.6, 1.28, True, True), ((0.48, 1.28),))
    monkeypatch.setattr(listening, "duplex_sample", lambda scene, generator: made)
    for place in (listening, evaluation):
        monkeypatch.setattr(place, "load_audio", lambda utterance: test_dialogue.recording())
    for place in ("dialogue", "hearing"):
        monkeypatch.setattr(f"freeze_omni_lite.{place}.SpeechGate", test_dialogue.ScriptedGate)
    monkeypatch.setattr(listening, "STREAM_PACKETS", {"10 s": 62, "an hour": 90})


def test_together_equals_one_by_one(system):
    waveforms = [test_dialogue.recording(voiced=count) for count in (3, 9, 5)]
    assert listening.read_ctc(system, waveforms) == [verbs.transcribe(system, w, "ctc") for w in waveforms]
    assert listening.read_llm(system, waveforms) == [verbs.transcribe(system, w, "llm") for w in waveforms]


def test_order_is_kept_over_batches(no_voices, system, monkeypatch):
    monkeypatch.setattr(listening, "BATCH_SECONDS", 3.2)
    said = listening.clean(7, seed=1)
    seen = []

    def change(place, waveform):
        seen.append(place)
        return torch.full((4,), float(place))

    read = lambda system, waveforms: [str(int(w[0])) for w in waveforms]  # noqa: E731
    read.__name__ = "read"
    assert listening.read_all(read, system, said, change) == [str(place) for place in range(7)]
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("place", range(4))
def test_noise_is_ten_decibels_below(place):
    waveform = test_dialogue.recording()
    added = listening.noisy(waveform, 1, place) - waveform
    assert audio.level_db(waveform) - audio.level_db(added) == pytest.approx(10, abs=0.05)


def test_questions_are_distinct_before_they_repeat():
    asked = listening.answerable(300, 900_001)
    assert len({question.text for question in asked}) == 300 and all(q.answers for q in asked)
    again = listening.answerable(310, 900_001)
    assert again[:300] == asked or len({question.text for question in again}) > 300


def test_own_seed_shares_no_sentence_with_a_training_run():
    from freeze_omni_lite import samples

    own = {u.text for u in samples.plan_transcription(40, listening.OWN_SEED + 1, "test")[20:]}
    assert not own & {u.text for u in samples.plan_transcription(400, 1, "train")}


def test_interval_holds_the_mean():
    low, high = listening.interval([0.0, 100.0] * 50, seed=1)
    assert low < 50 < high and 15 < high - low < 25
    assert listening.interval([3.0] * 10, seed=1) == (3.0, 3.0)


def test_scenes_wait_for_the_time_out():
    plan = [listening.waited(scene) for scene in plan_scenes(6, 6, 3, 1, "test")]
    assert all(scene.pauses_seconds[-1] >= 2.4 for scene in plan)


def test_rows_of_scenes():
    take, drop = (DialogueState.TAKE_TURN, DialogueState.NO_RESPONSE)
    found = []
    for scene in plan_scenes(12, 12, 2, 1, "test"):
        turns = [Decision(take if scene.complete and scene.addressed else drop, 9)]
        found.append((scene, Outcome.of(scene.kind, turns, 1.5)))
    rows = {row["what"]: row for row in listening.duplex_rows(found)}
    assert (rows["take-turn recall"]["figure"], rows["take-turn recall"]["reached"]) == (100, True)
    assert rows["early take-turns, pause_incomplete"]["figure"] == 0
    assert all(rows[f"rejected, {kind}"]["figure"] == 100 for kind in listening.NOT_ADDRESSED_KINDS)
    assert rows["decision delay, 90 %"]["figure"] == pytest.approx(100)
    few = {row["what"]: row for row in listening.duplex_rows(found[:1])}
    assert few["rejected, echo"]["figure"].startswith("not measured") and not few["rejected, echo"]["reached"]


def test_every_part_gives_rows(no_voices, system, monkeypatch):
    now = digest(system.llm.fingerprint())
    monkeypatch.setattr(test_dialogue.RandomStage, "metrics", {"llm_fingerprint": now}, raising=False)
    monkeypatch.setattr(measure, "import_module", lambda name, package: listening)
    monkeypatch.setattr("freeze_omni_lite.system.System.load", lambda *_: system)
    monkeypatch.setattr(
        listening, "from_manifest", lambda path: listening.clean(2, seed=3)
    )  # people's recordings take too long here
    record = measure.measure("listening", items=5)
    assert {"what", "date", "commit", "command", "cpu", "threads", "torch", "stages"} <= set(record)
    assert record["command"] == "freeze-omni measure listening --items 5"
    rows = {row["what"]: row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 34
    assert all(evaluation.is_honest(row["figure"]) for row in record["rows"])
    assert rows["stream state, growth to an hour"]["figure"] == 0
    assert (
        rows["LLM changed since training"]["figure"] == 0 and rows["LLM changed since training"]["items"] == 4
    )
    assert rows["take-turn recall"]["figure"] == 0  # the random head always listens


def test_a_changed_llm_is_seen(system, monkeypatch):
    monkeypatch.setattr(test_dialogue.RandomStage, "metrics", {"llm_fingerprint": "0" * 16}, raising=False)
    (row,) = listening.frozen(system, 1, 1)
    assert row["figure"] == 4 and row["reached"] is False
    monkeypatch.setattr(test_dialogue.RandomStage, "metrics", {}, raising=False)
    (row,) = listening.frozen(system, 1, 1)
    assert row["figure"].startswith("not measured") and row["reached"] is False
