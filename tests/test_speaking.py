"""Every part of the speaking measure on random parts: order is kept, a bad judge tells nothing, endings are counted."""

import pytest
import test_dialogue
import torch

from freeze_omni_lite import answers, metrics, scales, speaking, speech_tokens, verbs
from freeze_omni_lite.speech_tokens import Line, Spoken
from freeze_omni_lite.text import token_ids
from freeze_omni_lite.turns import text_turn

QUESTION = "what is the capital of france ?"


class KnowsOriginals(metrics.Judge):
    """Hears an original by its length, and nothing in any other sound."""

    def __init__(self, texts_by_length):
        super().__init__("a friend")
        self.texts_by_length = texts_by_length

    def transcribe(self, waveform):
        return self.texts_by_length.get(len(waveform), "")


class Brief(test_dialogue.RandomSystem):
    """Speaks a dozen tokens, always the likeliest."""

    def stage(self, name):
        stage = super().stage(name)
        if name == "decoder_nar_ar":
            stage.preset = scales.load(name, "tiny", max_speech_tokens=12, top_k=1)
        return stage


@pytest.fixture(scope="module")
def system():
    return Brief()


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """A voice that hums each text for a time of its own, a judge that knows these, and no LLM that writes."""
    judge = KnowsOriginals({})

    def voiced(lines):
        clips = [0.1 * torch.randn(600 * (5 + place)) for place in range(len(lines))]
        judge.texts_by_length |= {
            400 * (5 + place): line.text for place, line in enumerate(lines)
        }  # at 16 kHz
        return clips

    monkeypatch.setattr(speech_tokens, "voiced", voiced)
    monkeypatch.setattr(metrics.Judge, "best", staticmethod(lambda: judge))
    monkeypatch.setattr(speaking, "written_sentences", lambda writer, count, split: ["Paris is red."])
    monkeypatch.setattr(metrics, "no_dnsmos", lambda: "not measured: nobody rates", raising=False)
    monkeypatch.setenv("FREEZE_OMNI_CACHE", str(tmp_path))
    return judge


def by_name(rows):
    return {row["what"]: row for row in rows}


def test_codec(system, judge):
    rows = by_name(speaking.codec(system, 3, 1))
    above = rows["codec: CER above the originals'"]
    assert above["items"] == 3 and "its own CER on originals 0.0 %" in above["set"]
    assert above["figure"] == 0.0, "copies are as long as the originals, so this judge hears their texts"
    assert rows["codec: DNSMOS below the originals'"]["figure"] == "not measured: nobody rates"
    assert 0 < rows["codec: codebook perplexity"]["figure"] <= 100


def test_endings_are_counted_without_a_judge(system, judge, monkeypatch):
    test = speaking.test_of(system, [Line("hello."), Line("paris is red."), Line("yes.")], "tiny")
    lengths = [len(item.codes) for item in test.spoken]
    said = [[1] * lengths[0], [1] * (lengths[1] // 2), [1] * 200]
    monkeypatch.setattr(
        speaking, "speak", lambda system, test, seed, with_prefix=True: (said, [True, True, False])
    )
    rows = by_name(speaking.spoken_rows(system, test, 1, "it", "here", "<= 5"))
    shares = [rows[f"it: {name}"]["figure"] for name in ("ran to the limit", "stopped early", "either")]
    assert shares == pytest.approx([100 / 3, 100 / 3, 200 / 3])
    assert rows["it: CER of copies"]["figure"] == 0.0 and rows["it: CER"]["figure"] > 0
    judge.transcribe = lambda waveform: "nothing of the kind"
    rows = by_name(speaking.spoken_rows(system, test, 1, "it", "here", "<= 5"))
    assert rows["it: CER"]["figure"].startswith("not measured: the judge a friend gets")


def test_answers_and_free_sentences(system, judge, monkeypatch):
    monkeypatch.setattr(speaking.sentences, "questions", lambda *_: [type("Q", (), {"text": QUESTION})])
    monkeypatch.setattr(speaking, "kept_answers", lambda llm, prompt, asked, limit: ["paris is red"])
    rows = by_name(speaking.answers(system, 1, 1))
    assert rows["LLM answers: CER"]["items"] == 1 and "LLM answers without prefix: CER" in rows
    assert by_name(speaking.free(system, 3, 1))["free sentences: CER"]["items"] == 3


def test_speech_in_batches_equals_one_by_one(system, judge, monkeypatch):
    lines = [Line("hello."), Line("what is the capital of france?"), Line("yes.")]
    test = speaking.test_of(system, lines, "tiny")
    together = speaking.speak(system, test, 1)
    monkeypatch.setattr(speaking, "BATCH", 1)
    assert speaking.speak(system, test, 1) == together
    assert speaking.speak(system, test, 1, with_prefix=False)[0] != together[0]


def test_states_are_those_of_the_dialogue(system):
    llm, layout = system.llm, system.layout
    before = text_turn(layout, token_ids(llm.tokenizer, "Repeat this: hello"))
    written = token_ids(llm.tokenizer, "hello yes")
    rows = answers.states_of(llm, [(before, written), (before[:5], written[:1])])
    assert [len(states) for states in rows] == [len(written), 1]
    expected = [state for _, state in verbs.repeated(system, "hello")]
    own = answers.states_of(llm, [(before, token_ids(llm.tokenizer, "hello"))])[0]
    torch.testing.assert_close(own, torch.stack(expected), atol=1e-5, rtol=0)


def test_speed_and_sound(system, judge):
    rows = by_name(speaking.speed(system, 1, 1))
    assert (
        rows["speech tokens a second"]["figure"] > 0
        and rows["codec decoding: real-time factor"]["figure"] > 0
    )
    rows = by_name(speaking.sound(system, 2, 1))
    assert all(isinstance(row["figure"], int | float) for row in rows.values()) and len(rows) == 4


def test_silence_between_two_words_is_measured():
    hum, silence = 0.1 * torch.ones(24_000), torch.zeros(12_000)
    assert speaking.longest_gap(torch.cat([silence, hum, silence, hum])) == pytest.approx(0.5, abs=0.02)
    assert speaking.longest_gap(hum) == 0.0


def test_free_lines_are_unseen_and_speakable(judge):
    lines = speaking.free_lines(4, 1, "tiny")
    assert len(lines) == 4 and lines[-1].text == "Paris is red."
    assert all(isinstance(line, Line) and line.text[-1] in ".!?" for line in lines)
    assert not isinstance(lines[0], Spoken)
