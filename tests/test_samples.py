"""Manifests, cached synthesis, augmentation and batches."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from freeze_omni_lite import audio, augmentation, samples, scales, voices
from freeze_omni_lite.audio import CHUNK_SAMPLES, SAMPLE_RATE_HZ
from freeze_omni_lite.errors import InputError, PartMissing
from freeze_omni_lite.samples import Batches, Excerpts, Speech, Utterance, generator_for

DATA_SAMPLES = Path(__file__).resolve().parents[1] / "data_samples"
needs_voices = pytest.mark.skipif(
    not (voices.available(voices.ESPEAK) and voices.available(voices.HIBARI)),
    reason="no voices are installed",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache of this file's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEZE_OMNI_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def made(cache):
    """A dozen voiced utterances, two of them in the answer voice."""
    plan = samples.plan_transcription(10, seed=7) + samples.plan_answers(
        ["It is Paris.", "A lion is a wild animal."]
    )
    return samples.synthesize(plan, workers=1, progress=False)


def test_the_same_seed_plans_the_same_manifest_and_another_does_not():
    for plan in (samples.plan_sentences, samples.plan_questions, samples.plan_transcription):
        assert plan(30, 1, "train") == plan(30, 1, "train")
        assert [u.text for u in plan(30, 1, "train")] != [u.text for u in plan(30, 2, "train")]
        ids = [u.id for u in plan(30, 1, "train")]
        assert len(set(ids)) == len(ids)


def test_test_voices_and_texts_never_occur_in_training():
    train = samples.plan_transcription(6000, seed=1, split="train")
    test = samples.plan_transcription(600, seed=1, split="test")
    assert not {u.text for u in train} & {u.text for u in test}
    assert not {u.voice.name for u in train} & {u.voice.name for u in test}
    assert {u.voice.name for u in train} == {*voices.TRAIN_VOICES, voices.ANSWER_VOICE.name}
    assert not [u for u in train + test if voices.is_reserved(u.voice.name)]


@needs_voices
def test_synthesis_fills_in_what_was_made(made):
    for utterance in made:
        waveform = samples.load_audio(utterance)
        assert abs(len(waveform) / SAMPLE_RATE_HZ - utterance.duration_seconds) < 0.001
        assert len(utterance.sha256) == 64
        assert 0 <= utterance.segments[0][0] < utterance.last_voiced_seconds <= utterance.duration_seconds
    rates = {samples.CACHED_RATE_HZ[u.voice.engine] for u in made}
    assert rates == {16_000, 24_000}


@needs_voices
def test_a_second_synthesis_comes_from_the_cache(made, monkeypatch):
    monkeypatch.setattr(voices, "start_worker", lambda: pytest.fail("the cache was not used"))
    planned = [dataclasses.replace(u, path="", sha256="", segments=(), duration_seconds=0.0) for u in made]
    assert samples.synthesize(planned, progress=False) == made


@needs_voices
def test_two_syntheses_agree_in_text_duration_and_level(made, tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path))
    planned = [dataclasses.replace(u, path="", sha256="", segments=(), duration_seconds=0.0) for u in made]
    for first, second in zip(made, samples.synthesize(planned, workers=1, progress=False), strict=True):
        assert first.text == second.text and first.path != second.path
        assert second.duration_seconds == pytest.approx(first.duration_seconds, rel=0.05)
        levels = [audio.level_db(samples.load_audio(u)) for u in (first, second)]
        assert abs(levels[0] - levels[1]) < 1.0
        if first.voice.engine == voices.HIBARI:
            assert first.sha256 == second.sha256


@needs_voices
def test_manifests_survive_a_round_trip(made, tmp_path):
    path = samples.write_manifest(tmp_path / "made.jsonl", made)
    assert samples.from_manifest(path) == made


def test_the_cache_stays_under_its_limit_and_keeps_what_is_in_use(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path))
    folder = tmp_path / "audio" / "ab"
    folder.mkdir(parents=True)
    files = [folder / f"{age}.flac" for age in range(10)]
    for age, file in enumerate(files):
        file.write_bytes(bytes(1000))
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    assert samples.prune_cache(4000, keep={files[9]}) == 6
    assert [file.name for file in files if file.exists()] == ["0.flac", "1.flac", "2.flac", "9.flac"]


def test_audio_that_is_not_there_is_a_sentence():
    with pytest.raises(InputError, match=r"run samples.synthesize"):
        samples.load_audio(Utterance("u1", "hello"))
    with pytest.raises(InputError, match="neither audio nor a voice"):
        samples.synthesize([Utterance("u1", "hello")])


def test_bad_manifests_are_sentences(tmp_path):
    with pytest.raises(InputError, match="no manifest"):
        samples.from_manifest(tmp_path / "none.jsonl")
    bad = tmp_path / "bad.jsonl"
    for line in ("{", "[]", '{"text": "no path"}', "3"):
        bad.write_text(line)
        with pytest.raises(InputError, match="line 1"):
            samples.from_manifest(bad)
    bad.write_text('{"text": "gone", "path": "gone.wav"}')
    with pytest.raises(InputError, match=r"gone\.wav"):
        samples.from_manifest(bad)


def test_other_projects_manifests_are_read(tmp_path):
    audio.save(tmp_path / "a.wav", torch.zeros(8000), 16_000)
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"audio_filepath": "a.wav", "text": "hi", "duration": 0.5}) + "\n"
    )
    (utterance,) = samples.from_manifest(tmp_path / "m.jsonl")
    assert (utterance.id, utterance.text, utterance.duration_seconds) == ("a", "hi", 0.5)


def test_hugging_face_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PartMissing, match="pip install datasets"):
        next(samples.from_hugging_face("openslr/librispeech_asr", "test.clean"))


def test_voiced_segments_leave_silence_out_and_bridge_short_gaps():
    tone = 0.3 * torch.sin(torch.arange(8000) * 0.3)  # 0.5 s
    silence = torch.zeros(SAMPLE_RATE_HZ)
    waveform = torch.cat([silence, tone, silence[:1600], tone, silence, tone, silence])
    assert samples.voiced_segments(waveform) == ((1.0, 2.1), (3.1, 3.6))
    assert samples.voiced_segments(torch.zeros(SAMPLE_RATE_HZ)) == ()


def test_augmentation_is_repeatable_keeps_length_and_stays_in_range():
    waveform = 0.2 * torch.randn(20_000, generator=generator_for(0))
    seen = set()
    for seed in range(12):
        first = augmentation.augment(waveform, generator_for(seed))
        assert torch.equal(first, augmentation.augment(waveform, generator_for(seed)))
        assert first.shape == waveform.shape and first.abs().max() <= 1 and first.isfinite().all()
        seen.add(round(audio.level_db(first), 1))
    assert len(seen) > 8


@pytest.mark.parametrize("kind", ["white", "pink", "hum", "chatter", "music"])
def test_noise_stands_at_the_wanted_distance(kind):
    waveform = 0.1 * torch.randn(32_000, generator=generator_for(1))
    noise = augmentation.make_noise(kind, len(waveform), generator_for(2))
    added = augmentation.add_noise(waveform, noise, 10.0) - waveform
    assert audio.level_db(waveform) - audio.level_db(added) == pytest.approx(10.0, abs=0.1)


def test_spec_augment_changes_few_frames_and_no_padding():
    mels = torch.randn(3, 200, 80, generator=generator_for(3))
    lengths = torch.tensor([200, 120, 16])
    changed = augmentation.spec_augment(mels, lengths, generator_for(4))
    assert torch.equal(changed, augmentation.spec_augment(mels, lengths, generator_for(4)))
    assert not torch.equal(changed, mels)
    assert (changed != mels).float().mean() < 0.6
    gap_frames = (changed[2] != mels[2]).all(dim=1).sum()
    assert gap_frames <= 4


def test_collate_pads_to_whole_chunks_with_zeros():
    waveforms = [torch.ones(1), torch.ones(CHUNK_SAMPLES), torch.ones(CHUNK_SAMPLES + 1)]
    padded, chunk_lengths = samples.collate(waveforms)
    assert padded.shape == (3, 2 * CHUNK_SAMPLES)
    assert chunk_lengths.tolist() == [1, 1, 2]
    assert padded.sum(dim=1).tolist() == [len(waveform) for waveform in waveforms]


def durations(count=300):
    return (1 + 9 * torch.rand(count, generator=generator_for(5))).tolist()


def test_batches_cover_every_item_once_in_each_pass():
    batches = Batches(durations(), batch_seconds=40, seed=1)
    for epoch in range(3):
        items = [i for n in range(len(batches)) for i in batches[epoch * len(batches) + n]]
        assert sorted(items) == list(range(300))


def test_batches_are_pure_and_shuffled_anew_in_each_pass():
    first, second = (Batches(durations(), batch_seconds=40, seed=1) for _ in range(2))
    far = 2 * len(first) + 3
    assert first[far] == second[far]  # without having walked there
    assert [second[n] for n in range(5)] == [first[n] for n in range(5)]
    assert {frozenset(first[n]) for n in range(len(first))} != {
        frozenset(first[len(first) + n]) for n in range(len(first))
    }
    assert Batches(durations(), 40, seed=2)[0] != first[0]


def test_two_ranks_share_what_one_rank_sees():
    batches = Batches(durations(), batch_seconds=40, seed=1)
    alone = [batches.at(step) for step in range(8)]
    together = [batches.at(step, rank, 2) for step in range(4) for rank in range(2)]
    assert alone == together


def test_batches_hold_about_the_wanted_seconds_of_similar_lengths():
    seconds = durations()
    batches = Batches(seconds, batch_seconds=40, seed=1)
    padded = [max(seconds[i] for i in batches[n]) * len(batches[n]) for n in range(len(batches))]
    real = sum(seconds)
    assert max(padded) <= 40
    assert sum(padded) < 1.25 * real
    assert Batches([90.0, 1.0], batch_seconds=40)[0] in ([0], [1])  # longer than a batch: alone


@needs_voices
def test_speech_is_a_pure_function_of_the_step(made):
    speech = Speech(made, batch_seconds=12, seed=3, augmented=True)
    first, again = speech(5), Speech(made, batch_seconds=12, seed=3, augmented=True)(5)
    assert torch.equal(first["waveforms"], again["waveforms"]) and first["texts"] == again["texts"]
    assert first["step"] == 5
    assert first["waveforms"].shape == (
        len(first["texts"]),
        int(first["chunk_lengths"].max()) * CHUNK_SAMPLES,
    )
    assert speech.recipe != Speech(made[1:], batch_seconds=12, seed=3, augmented=True).recipe
    plain = Speech(made, batch_seconds=12)(0)
    utterance = plain["utterances"][0]
    assert torch.equal(
        plain["waveforms"][0, : len(samples.load_audio(utterance))], samples.load_audio(utterance)
    )


@needs_voices
def test_excerpts_are_of_one_length_and_repeatable(made):
    answers = [u for u in made if u.kind == "answer"]
    excerpts = Excerpts(answers, batch_seconds=6, segment_seconds=2.0)
    batch = excerpts(4)
    assert batch["waveforms"].shape == (3, 48_000)
    assert batch["lengths"].max() <= 48_000 and batch["step"] == 4
    assert torch.equal(batch["waveforms"], excerpts(4)["waveforms"])


def test_human_recordings_are_there_with_their_licences():
    rows = [json.loads(line) for line in (DATA_SAMPLES / "human.jsonl").read_text().splitlines()]
    found = samples.from_manifest(DATA_SAMPLES / "human.jsonl")
    assert len(found) >= 20 and len({u.speaker for u in found}) >= 3
    assert all(row["licence"] and row["source"] for row in rows)
    for utterance in found:
        waveform = audio.load(utterance.path)
        assert len(waveform) / SAMPLE_RATE_HZ == pytest.approx(utterance.duration_seconds, abs=0.01)
        assert -40 < audio.level_db(waveform) < -10


def test_sample_questions_can_be_loaded():
    found = samples.from_manifest(DATA_SAMPLES / "questions.jsonl")
    assert len(found) == 4 and all(u.answers for u in found)
    for utterance in found:
        waveform = audio.load(utterance.path)
        assert len(waveform) / SAMPLE_RATE_HZ == pytest.approx(utterance.duration_seconds, abs=0.01)
        assert not voices.is_reserved(utterance.voice.name)


# ------------------------------------------------------------------------------------- data of a listening stage


def test_synthetic_transcription_is_the_plan_with_audio(monkeypatch):
    monkeypatch.setattr(samples, "synthesize", lambda plan: plan)  # the voices have tests of their own
    preset = scales.load("encoder_ctc", "tiny", utterances=6, test_utterances=2)
    assert samples.transcription(preset, 3) == samples.plan_transcription(6, 3)
    assert samples.transcription(preset, 3, "test") == samples.plan_transcription(2, 3, "test")


def test_a_manifest_keeps_its_test_speakers_apart(tmp_path):
    rows = [
        Utterance(str(i), f"text {i}", speaker=f"s{i % 4}", path=f"{i}.flac", duration_seconds=1.0)
        for i in range(16)
    ]
    path = samples.write_manifest(tmp_path / "corpus.jsonl", rows)
    preset = scales.load("encoder_ctc", "tiny", corpus="manifest", manifest=str(path), test_utterances=3)
    train, test = samples.transcription(preset, 1), samples.transcription(preset, 2, "test")
    assert len(test) == 3 and len(train) == 12
    assert not {u.speaker for u in train} & {u.speaker for u in test}
    with pytest.raises(InputError, match="none are left"):
        samples.held_out(rows, 16)


def test_a_corpus_without_its_manifest_is_one_sentence():
    with pytest.raises(InputError, match="set both"):
        samples.transcription(scales.load("encoder_ctc", "tiny", corpus="manifest"), 1)
