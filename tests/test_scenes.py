"""Duplex scenes: planned purely, voiced by users only, and labelled where the voice ends."""

import pytest
import torch

from freeze_omni_lite import audio, scenes, voices
from freeze_omni_lite.audio import CHUNK_MS, CHUNK_SAMPLES, SAMPLE_RATE_HZ
from freeze_omni_lite.duplex import DialogueState, label_chunks
from freeze_omni_lite.frozen_llm import IGNORE
from freeze_omni_lite.samples import generator_for, recipe_of

needs_voices = pytest.mark.skipif(
    not (voices.available(voices.ESPEAK) and voices.available(voices.HIBARI)),
    reason="no voices are installed",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEZE_OMNI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield scenes.synthesize_scenes(scenes.plan_scenes(6, 6, 2, seed=1), workers=1, progress=False)


def test_scenes_are_a_pure_function_of_the_seed():
    assert scenes.plan_scenes(12, 12, 6, 1) == scenes.plan_scenes(12, 12, 6, 1)
    assert scenes.plan_scenes(12, 12, 6, 1) != scenes.plan_scenes(12, 12, 6, 2)


def test_scenes_of_the_splits_share_no_text_and_no_voice():
    train, test = scenes.plan_scenes(600, 300, 150, 1, "train"), scenes.plan_scenes(120, 120, 60, 1, "test")
    assert not {s.text for s in train if s.pieces} & {s.text for s in test if s.pieces}
    users = [{s.voice.name for s in group if s.voice and s.kind != "echo"} for group in (train, test)]
    assert not users[0] & users[1]


def test_the_answer_voice_is_heard_in_echoes_only():
    for scene in scenes.plan_scenes(60, 60, 20, 1):
        if scene.voice:
            assert (scene.voice == voices.ANSWER_VOICE) == (scene.kind == "echo")
            assert not voices.is_reserved(scene.voice.name)


def test_every_kind_occurs_and_says_what_it_is():
    planned = scenes.plan_scenes(24, 24, 6, 1)
    kinds = {scene.kind for scene in planned}
    assert kinds == {*scenes.COMPLETE_KINDS, *scenes.NOT_ADDRESSED_KINDS, "unfinished"}
    for scene in planned:
        assert scene.addressed == (scene.kind not in scenes.NOT_ADDRESSED_KINDS)
        assert scene.complete == (scene.kind != "unfinished")
        assert all(pause <= 1.0 for pause in scene.pauses_seconds[1:-1])


@needs_voices
def test_the_voice_ends_where_the_timeline_says(made):
    for scene in made:
        waveform, timeline, segments = scenes.duplex_sample(scene, generator_for(1), room=False)
        assert len(waveform) / SAMPLE_RATE_HZ == timeline.duration_seconds
        assert timeline.duration_seconds == pytest.approx(scene.duration_seconds, abs=0.01)
        assert segments[-1][1] == timeline.last_voiced_seconds
        end = round(timeline.last_voiced_seconds * SAMPLE_RATE_HZ)
        begin = round(segments[-1][0] * SAMPLE_RATE_HZ)
        assert audio.level_db(waveform[begin:end]) > audio.level_db(waveform[end:]) + 2, scene.kind


@needs_voices
def test_a_scene_is_repeatable(made):
    first, again, other = (scenes.duplex_sample(made[0], generator_for(seed)).waveform for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@needs_voices
def test_every_scene_has_one_decision(made):
    for scene in made:
        waveform, timeline, _ = scenes.duplex_sample(scene, generator_for(1))
        row = label_chunks(timeline, -(-len(waveform) // CHUNK_SAMPLES)).tolist()
        decided = [(chunk, label) for chunk, label in enumerate(row) if label not in (0, IGNORE)]
        wanted = DialogueState.TAKE_TURN if scene.complete and scene.addressed else DialogueState.NO_RESPONSE
        assert [label for _, label in decided] == [wanted], scene.kind
        assert (decided[0][0] + 1) * CHUNK_MS >= 1000 * timeline.last_voiced_seconds + 160


@needs_voices
def test_another_set_of_scenes_is_another_recipe(made):
    assert recipe_of(made) == recipe_of(list(made))
    assert recipe_of(made) != recipe_of(made[1:])


def test_a_dialogue_is_complete_questions_in_one_voice():
    dialogues = scenes.plan_dialogues(7, 3, seed=1)
    assert [len(turns) for turns in dialogues] == [1, 2, 3, 1, 2, 3, 1]
    assert dialogues == scenes.plan_dialogues(7, 3, seed=1)
    for turns in dialogues:
        assert len({scene.voice for scene in turns}) == 1
        assert all(scene.complete and scene.addressed for scene in turns)
    asked = [scene for turns in dialogues for scene in turns]
    assert len({scene.id for scene in asked}) == len({scene.text for scene in asked}) == 13
    right = next(scene for scene in asked if scene.answers)
    assert right.accepts(f"It is {right.answers[0]}.") and not right.accepts("I do not know.")
