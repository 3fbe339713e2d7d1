"""The four tables on random parts and on hand-made items: right numbers, and honest gaps."""

import math

import pytest
import torch
from test_dialogue import RandomSystem, ScriptedGate, recording

from freeze_omni_lite import evaluation, verbs
from freeze_omni_lite.errors import InputError
from freeze_omni_lite.evaluation import Asked, Transcribed
from freeze_omni_lite.metrics import Judge
from freeze_omni_lite.samples import Utterance
from freeze_omni_lite.speech_tokens import Spoken
from freeze_omni_lite.turns import Row, answer_questions, whole_sentences, written

ANSWERS = [
    Spoken("paris", torch.arange(5), "what is the capital of france ?", "paris"),
    Spoken("hello yes", torch.arange(9), "hello ?", "hello yes"),
]


class Ear(Judge):
    """Hears the same words in everything."""

    def __init__(self, heard: str) -> None:
        super().__init__("ear")
        self.heard, self.asked = heard, 0

    def transcribe(self, waveform):
        assert waveform.isfinite().all() and waveform.dim() == 1
        self.asked += 1
        return self.heard


@pytest.fixture(scope="module")
def system():
    return RandomSystem()


@pytest.fixture
def spoken_questions(monkeypatch):
    monkeypatch.setattr("freeze_omni_lite.dialogue.SpeechGate", ScriptedGate)
    monkeypatch.setattr(evaluation, "load_audio", lambda utterance: recording())
    return [
        Utterance(str(i), text, answers=("paris",)) for i, text in enumerate(["what is paris ?", "hello"])
    ]


def test_transcription_rates():
    items = [Transcribed("Turn left!", "turn left", "left"), Transcribed("Stop.", "top", "stop")]
    ctc, llm = evaluation.transcription_rows("unseen", items)
    assert (ctc["speech"], ctc["items"], ctc["read by"]) == ("unseen", 2, "CTC (stage 1)")
    assert ctc["WER %"] == pytest.approx(100 / 3) and ctc["CER %"] == pytest.approx(100 / 13)
    assert llm["WER %"] == pytest.approx(100 / 3) and llm["CER %"] == pytest.approx(500 / 13)


def test_transcription_table_has_a_row_for_each_way(system, spoken_questions):
    rows = evaluation.transcription_table(system, {"one": spoken_questions, "two": spoken_questions[:1]})
    assert [(row["speech"], row["items"]) for row in rows] == [("one", 2)] * 2 + [("two", 1)] * 2
    assert all(map(evaluation.is_honest, (cell for row in rows for cell in row.values())))


def test_speech_of_a_good_judge_has_figures(system):
    judge = Ear("paris")
    judge.calibrate([torch.zeros(800)], ["paris"])
    rows = evaluation.speaking_table(system, ANSWERS, judge, top_ks=(1, 2))
    assert [row["top_k"] for row in rows] == [1, 2, 1, 2, ""]
    assert all(row["WER %"] == pytest.approx(200 / 3) for row in rows)  # 2 of "paris hello yes" never heard
    assert all(0 <= row["ended %"] <= 100 and row["length"] >= 0 for row in rows[:-1])


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_bad_judge_is_not_asked_and_does_not_pass(system, calibrated):
    judge = Ear("rome")
    if calibrated:
        judge.calibrate([torch.zeros(800)], ["paris"])
    before = judge.asked
    rows = evaluation.speaking_table(system, ANSWERS, judge, top_ks=(2,))
    assert judge.asked == before
    assert all(row["WER %"].startswith("not measured: the judge ear") for row in rows)
    assert evaluation.is_measured(rows[0]["length"]) and not evaluation.is_measured(rows[0]["WER %"])


def test_the_states_of_an_answer_are_those_of_generating_it(system):
    llm, layout = system.llm, system.layout
    before = layout.system + layout.user + llm.tokenizer.encode(ANSWERS[0].question) + layout.assistant
    cache = llm.new_cache()
    hidden = llm.prefill(llm.embed([before]), cache)[0, -1:]
    ids = llm.tokenizer.encode(ANSWERS[1].written)
    steps = [hidden, *(llm.step(token, cache)[0] for token in ids[:-1])]
    spoken = Spoken("hello yes", torch.arange(3), ANSWERS[0].question, "hello yes")
    torch.testing.assert_close(
        evaluation.states_of(llm, layout, spoken), torch.cat(steps), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(InputError, match="answers no question"):
        evaluation.states_of(llm, layout, Spoken("hello", torch.arange(3)))


def test_no_tokens_sound_as_silence(system):
    assert not evaluation.sound(system, []).any()
    assert len(evaluation.sound(system, [1, 2])) == 2 * 600 * 16 // 24


def test_accuracy_by_text_and_by_speech():
    items = [
        Asked("capital of france?", ("paris",), "It is Paris.", "It is Paris."),
        Asked("colour of a banana?", ("yellow",), "Yellow, mostly.", "Bananas."),
    ]
    text, speech = evaluation.question_rows(items)
    assert (text["accuracy %"], speech["accuracy %"], speech["same answer as by text %"]) == (100, 50, 50)


def test_questions_need_accepted_answers(system):
    with pytest.raises(InputError, match="no accepted answers"):
        evaluation.asked(system, [Utterance("1", "what is red ?")])


def test_both_ways_ask_the_same_frozen_llm(system, spoken_questions):
    before = system.llm.fingerprint()
    items = evaluation.asked(system, spoken_questions)
    texts = [question.text for question in spoken_questions]
    limit = system.stage("encoder_prompt").preset.answer_tokens
    batched = answer_questions(system.llm, system.layout, texts, limit)
    assert [whole_sentences(item.by_text) for item in items] == batched
    assert system.llm.fingerprint() == before


def test_a_question_by_speech_equals_the_streamed_turn(system, spoken_questions):
    """Chunk by chunk or at once, the LLM reads the same row: the gate opens at the first voiced chunk."""
    waveform = recording(silent=0, silent_after=0)
    trace = evaluation.talk_to_the_end(system, waveform)
    row = evaluation.spoken_question(system, waveform)
    limit = system.stage("encoder_prompt").preset.answer_tokens
    assert trace["outcome"] == "answered" and trace["text"].strip() == written(row, limit)


def test_writing_together_equals_writing_alone(system):
    torch.manual_seed(3)
    rows = [Row(system.llm).tokens([1, 5]).trained(torch.randn(n, system.llm.width)) for n in (2, 9, 5)]
    limits = [4, 7, 12]
    alone = [written(row, limit) for row, limit in zip(rows, limits, strict=True)]
    assert evaluation.write_together(system.llm, rows, limits, batch=2) == alone and len(set(alone)) > 1


def test_transcripts_equal_the_verb(system, spoken_questions):
    items = evaluation.transcribed(system, spoken_questions)
    assert [item.ctc for item in items] == [verbs.transcribe(system, recording(), "ctc")] * 2
    assert [item.llm for item in items] == [verbs.transcribe(system, recording(), "llm")] * 2


def test_latency_rows_and_their_gaps(system, spoken_questions):
    system.answer_with(0)  # never decided: the answer is forced
    rows = evaluation.latency_table(system, spoken_questions)
    assert [row["turns"] for row in rows] == [0, 2, 2, 2, 2]
    system.answer_with(2)  # ignored: answered in a second try
    assert [row["turns"] for row in evaluation.latency_table(system, spoken_questions)] == [2, 2, 2, 2, 2]
    assert "none of 2 turns" in rows[0]["mean ms"]
    assert len(rows) == 5 and all(map(evaluation.is_honest, (cell for row in rows for cell in row.values())))
    trace = {"latency_ms": dict.fromkeys(evaluation.PARTS, 100.0)}
    row = evaluation.latency_rows([trace, {"latency_ms": dict.fromkeys(evaluation.PARTS, 300.0)}])[-1]
    assert (row["mean ms"], row["50 %"], row["90 %"], row["turns"]) == (200, 200, 280, 2)


def test_text_of_a_table_numbers_its_reasons():
    rows = [{"part": "a", "x": 1.5}, {"part": "b", "x": "not measured: no ear"}]
    assert evaluation.as_text(rows, "T").splitlines() == [
        "T",
        "part  x",
        "a     1.5",
        "b     - [1]",
        "[1] not measured: no ear",
    ]
    with pytest.raises(InputError, match="at least one row"):
        evaluation.as_text([])


def test_honest_cells():
    assert all(map(evaluation.is_honest, [1, 2.5, "name", "not measured: why"]))
    assert not any(map(evaluation.is_honest, [math.nan, math.inf, None, "not measured", "not measured: "]))
