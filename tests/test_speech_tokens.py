"""A corpus as tokens: batches equal singles, shards resume and round-trip, other codecs' tokens are refused."""

import dataclasses

import pytest
import tiny
import torch

from freeze_omni_lite import answers, audio, samples, scales, speech_tokens
from freeze_omni_lite.codec import Codec
from freeze_omni_lite.errors import InputError, StageMismatch
from freeze_omni_lite.speech_tokens import (
    Corpus,
    Line,
    Spoken,
    free_sentences,
    read_shards,
    tokenize,
    tokens_in,
    write_shards,
)
from freeze_omni_lite.text import clean_for_speech

HASH = "a" * 64
ANSWER = Line("two", "what comes after one?", written="**two**")
LINES = [Line("one"), ANSWER, Line("three"), Line("four, five"), Line("six")]
LENGTHS = [1, 5_999, 24_000, 601, 14_400]


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(1)
    return Codec.from_preset(scales.load("codec", "tiny")).eval()


def waveforms() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(length, generator=generator) for length in LENGTHS]


class Voice:
    """A stand-in for the synthesiser that notes what it was asked to say."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self.calls_left = stop_after

    def __call__(self, lines) -> list[torch.Tensor]:
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left = None if self.calls_left is None else self.calls_left - 1
        self.said += [line.text for line in lines]
        return [waveforms()[LINES.index(line)] for line in lines]


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_batch_equals_single(codec):
    alone = [codec.encode(waveform[None])[0] for waveform in waveforms()]
    for size in (1, 2, 8):
        together = tokenize(codec, waveforms(), batch=size)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), size


def test_one_token_for_every_600_samples_begun(codec):
    assert [len(codes) for codes in tokenize(codec, waveforms())] == [tokens_in(n) for n in LENGTHS]
    assert [tokens_in(n) for n in LENGTHS] == [1, 10, 40, 2, 24]


def test_round_trip(codec, tmp_path):
    assert write_shards(tmp_path, codec, HASH, LINES, 2, Voice()) == 3
    spoken = read_shards(tmp_path, HASH)
    for item, line in zip(spoken, LINES, strict=True):
        assert (item.text, item.question, item.written) == (line.text, line.question, line.written)
    for item, codes in zip(spoken, tokenize(codec, waveforms()), strict=True):
        assert item.codes.dtype == torch.long and torch.equal(item.codes, codes)
    assert spoken[2].seconds == 1.0


def test_second_run_writes_and_says_nothing(codec, tmp_path):
    write_shards(tmp_path, codec, HASH, LINES, 2, Voice())
    before, voice = bytes_of(tmp_path), Voice()
    assert write_shards(tmp_path, codec, HASH, LINES, 2, voice) == 0
    assert voice.said == [] and bytes_of(tmp_path) == before


def test_interrupted_run_goes_on_where_it_stopped(codec, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "a", codec, HASH, LINES, 2, Voice(stop_after=1))
    voice = Voice()
    assert write_shards(tmp_path / "a", codec, HASH, LINES, 2, voice) == 2
    assert voice.said == [line.text for line in LINES[2:]]
    write_shards(tmp_path / "b", codec, HASH, LINES, 2, Voice())
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_changed_line_rewrites_its_shard_only(codec, tmp_path):
    write_shards(tmp_path, codec, HASH, LINES, 2, Voice())
    changed = [dataclasses.replace(LINES[0], question="what?"), *LINES[1:]]
    assert write_shards(tmp_path, codec, HASH, changed, 2, lambda lines: waveforms()[: len(lines)]) == 1
    assert read_shards(tmp_path, HASH)[0].question == "what?"


def test_other_codec_rewrites_everything(codec, tmp_path):
    write_shards(tmp_path, codec, HASH, LINES, 2, Voice())
    assert write_shards(tmp_path, codec, "b" * 64, LINES, 2, Voice()) == 3


def test_shards_of_a_longer_corpus_go(codec, tmp_path):
    write_shards(tmp_path, codec, HASH, LINES, 1, Voice())
    write_shards(tmp_path, codec, HASH, LINES[:2], 1, Voice())
    assert [item.text for item in read_shards(tmp_path, HASH)] == ["one", "two"]


def test_two_ranks_share_the_shards(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(speech_tokens, "world", lambda: 2)
    written = []
    for rank in (1, 0):
        monkeypatch.setattr(speech_tokens, "rank", lambda rank=rank: rank)
        written.append(write_shards(tmp_path, codec, HASH, LINES, 2, Voice()))
    assert written == [1, 2]
    assert [item.text for item in read_shards(tmp_path, HASH)] == [line.text for line in LINES]


def test_tokens_of_another_codec_are_refused(codec, tmp_path):
    write_shards(tmp_path, codec, HASH, LINES, 2, Voice())
    with pytest.raises(StageMismatch, match=r"made by codec aaaaaaaa.*run notebook 05 again"):
        read_shards(tmp_path, "b" * 64)


def test_missing_and_damaged_shards_say_what_to_do(codec, tmp_path):
    with pytest.raises(StageMismatch, match=r"no shards.*run notebook 05"):
        read_shards(tmp_path)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"half a file")
    with pytest.raises(StageMismatch, match="delete it and run notebook 05"):
        read_shards(tmp_path)
    assert write_shards(tmp_path, codec, HASH, LINES[:1], 2, Voice()) == 1  # a damaged one is written again


def test_nothing_to_say(codec, tmp_path):
    with pytest.raises(InputError, match="no text to voice"):
        write_shards(tmp_path, codec, HASH, [], 2, Voice())


def test_corpus_counts_codes_and_its_digest_sees_texts():
    spoken = [Spoken("a", torch.tensor([0, 2, 2])), Spoken("b", torch.tensor([3]), "why?")]
    corpus = Corpus.of(spoken, 4)
    assert corpus.counts.tolist() == [1, 0, 2, 1]
    assert torch.equal(corpus.digest, Corpus.of(spoken, 4).digest)
    for other in (Spoken("b", torch.tensor([3])), Spoken("c", torch.tensor([3]), "why?")):
        assert not torch.equal(corpus.digest, Corpus.of([spoken[0], other], 4).digest)
    fresh = Corpus(4)
    fresh.load_state_dict(corpus.state_dict())
    assert torch.equal(fresh.digest, corpus.digest) and not list(corpus.parameters())


def test_sentences_of_the_splits_differ():
    preset = scales.load("speech_tokens", "tiny")
    train, test = (speech_tokens.free_sentences(preset, 1, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (preset.sentences, preset.test_sentences)
    assert set(train).isdisjoint(test) and train == speech_tokens.free_sentences(preset, 1)


@pytest.fixture
def manifest(tmp_path):
    """Three recordings at 16 kHz of different lengths."""
    rows = []
    for number in range(3):
        path = audio.save(tmp_path / f"{number}.wav", 0.1 * torch.randn(1600 * (number + 1)), 16_000)
        rows.append(samples.Utterance(str(number), f"Take {number}.", path=path.name, duration_seconds=0.1))
    return samples.write_manifest(tmp_path / "corpus.jsonl", rows)


def test_manifest_is_the_corpus(manifest):
    changes = {"corpus": "manifest", "manifest": str(manifest)}
    preset = scales.load("speech_tokens", "tiny", test_sentences=1, **changes)
    train, test = (speech_tokens.free_sentences(preset, 1, split) for split in ("train", "test"))
    assert ([line.text for line in train], [line.text for line in test]) == (
        ["Take one.", "Take two."],
        ["Take zero."],
    )
    assert [len(clip) for clip in speech_tokens.voiced(train)] == [4800, 7200]  # at 24 kHz

    codec_preset = scales.load("codec", "tiny", test_utterances=1, **changes)
    found = [samples.answer_voice_speech(codec_preset, 1, split) for split in ("train", "test")]
    assert [[row.id for row in rows] for rows in found] == [["1", "2"], ["0"]]
    with pytest.raises(InputError, match="3 utterances, expected more than the 4 held out"):
        samples.answer_voice_speech(scales.load("codec", "tiny", **changes), 1)


def test_free_sentences_are_speakable_and_the_splits_never_meet():
    preset = scales.load("speech_tokens", "tiny", sentences=400, test_sentences=60)
    train, test = ([line.text for line in free_sentences(preset, 1, split)] for split in ("train", "test"))
    assert (len(train), len(test)) == (400, 60) and not set(train) & set(test)
    assert not any(character.isdigit() or character in "$%°" for text in train + test for character in text)
    assert all(text == clean_for_speech(text) for text in train + test)
    assert any(" dollars and " in text for text in train) and any(" percent " in text for text in train)


def test_written_sentences_are_half_at_most(monkeypatch):
    monkeypatch.setattr(speech_tokens, "written_sentences", lambda writer, count: ["A boat sank."] * count)
    preset = scales.load("speech_tokens", "tiny", sentences=10, written=8)
    train = [line.text for line in free_sentences(preset, 1)]
    assert len(train) == 10 and train.count("A boat sank.") == 5
    assert "A boat sank." not in [line.text for line in free_sentences(preset, 1, "test")]


def test_answers_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path))
    monkeypatch.setattr(answers, "SHARD_QUESTIONS", 2)
    llm, questions = tiny.llm(), ["what is red ?", "hello", "what is paris ?"]
    first = answers.kept_answers(llm, "you are helpful", questions[:2], 4)
    asked = []
    answer = lambda llm, layout, new, *limits: asked.extend(new) or ["fine"] * len(new)  # noqa: E731
    monkeypatch.setattr(answers, "answer_questions", answer)
    assert answers.kept_answers(llm, "you are helpful", questions[::-1], 4) == ["fine", *first[::-1]]
    assert asked == questions[2:] and len(list(tmp_path.glob("answers/*/*.json"))) == 2
    answers.kept_answers(tiny.llm(seed=1), "you are helpful", questions[:1], 4)
    answers.kept_answers(llm, "you are", questions[:1], 4)
    assert asked[1:] == questions[:1] * 2, "another LLM and another system text have answers of their own"


def test_there_are_more_questions_than_topics_have(monkeypatch):
    monkeypatch.setattr(speech_tokens, "split_words", lambda tokenizer, split: ["boat", "tree", "hill"])
    asked = speech_tokens.questions(None, 2372, 1)
    assert len(set(asked)) == len(asked) == 2372 and asked[-1] == "Can you tell me something about tree?"
    assert speech_tokens.questions(None, 50, 1) == asked[:50]


def test_answers_are_asked_once_and_speakable(monkeypatch, tmp_path):
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path))
    preset = scales.load("speech_tokens", "tiny", answers=6, answer_tokens=4)
    lines = speech_tokens.llm_answers(tiny.llm(), preset, "you are helpful", seed=1)
    assert len({line.question for line in lines}) == len(lines) <= 6
    assert all(line.question and line.text[-1] in ".!?" for line in lines)
