"""Texts: pure functions of a seed, splits that never meet, questions that can be judged."""

import itertools

import pytest

from freeze_omni_lite import sentences

MAKERS = (
    sentences.sentences,
    sentences.spoken_sentences,
    sentences.not_addressed,
    sentences.unfinished,
    sentences.back_channels,
)


@pytest.mark.parametrize("split", ["train", "test"])
def test_texts_are_a_pure_function_of_the_seed(split):
    for make in (*MAKERS, sentences.questions):
        assert make(40, 3, split) == make(40, 3, split)
        assert make(40, 3, split) != make(40, 4, split)


def test_test_questions_share_neither_wording_nor_entity_with_training():
    train, test = sentences.all_questions("train"), sentences.all_questions("test")
    assert not {q.text for q in train} & {q.text for q in test}
    for name, topic in sentences.TOPICS.items():
        assert not set(topic.train) & set(topic.test)
        assert not set(sentences.entities(name, "train")) & set(sentences.entities(name, "test"))


def test_held_out_countries_are_held_out_under_every_topic():
    countries = set(sentences.CAPITALS)
    asked = {q.entity for q in sentences.all_questions("train")} & countries
    assert not asked & {q.entity for q in sentences.all_questions("test")}


def test_free_texts_of_the_splits_never_meet():
    for make in MAKERS:
        assert not set(make(5000, 1, "train")) & set(make(2000, 1, "test"))


def test_there_are_enough_questions_with_answers():
    judged = {q.text for q in sentences.all_questions("test") if q.answers}
    assert len(judged) >= 300
    assert len(sentences.all_questions("train")) >= 2000


def test_a_small_set_covers_every_topic():
    asked = sentences.questions(len(sentences.TOPICS), 1)
    assert {q.topic for q in asked} == set(sentences.TOPICS)
    assert len({q.text for q in sentences.questions(300, 1, "test")}) == 300


def test_sentences_are_short_varied_and_spelled_out():
    texts = sentences.sentences(3000, 1)
    assert len(set(texts)) == 3000
    assert max(len(text.split()) for text in texts) <= 20
    assert not any(mark in text for text in texts for mark in "{}0123456789")


def test_every_question_can_be_broken_off_before_its_entity():
    for question in sentences.all_questions("test"):
        before, after = sentences.cut_in_two(question)
        assert f"{before} {after}".strip() == question.text
        if after:
            assert question.entity.split()[-1] in after


def test_accepted_answers_are_found_as_whole_words():
    question = sentences.Question(
        "What is the capital of Bolivia?", "capital", "Bolivia", ("sucre", "la paz")
    )
    assert question.accepts("The capital of Bolivia is La Paz.")
    assert question.accepts("Sucre!")
    assert not question.accepts("Lapaz is close.")
    assert not sentences.Question("What is a bridge?", "definition", "a bridge").accepts("a bridge")


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train"):
        sentences.questions(1, 1, "dev")


def test_patchwork_joins_fragments_of_what_was_written():
    written = ["The old boat lay on the sand.", "Birds sing before the sun comes up."]
    texts = sentences.patchwork(30, written, seed=1)
    assert texts == sentences.patchwork(30, written, seed=1) != sentences.patchwork(30, written, seed=2)
    pairs = {pair for text in written for pair in zip(text.split(), text.split()[1:], strict=False)}
    for text in texts:
        words = text.rstrip(".").split()
        assert 4 <= len(words) <= 20 and words[0][0].isupper()
        assert any(pair in pairs for pair in itertools.pairwise(words[1:])) or len(words) < 6
