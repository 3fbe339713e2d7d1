"""Batches of spoken texts: whole passes, padding, hidden states beside, answers held out."""

import pytest
import torch
from tiny import tokenizer

from freeze_omni_lite import speech_tokens
from freeze_omni_lite.speech_tokens import Line, Spoken, SpokenBatches, hold_out_answers, part_of
from freeze_omni_lite.text import Speller


@pytest.fixture
def spoken():
    generator = torch.Generator().manual_seed(1)
    texts = ["hello", "paris is red", "what is the capital of france?", "no"]
    return [
        Spoken(text, torch.randint(64, (20 + 15 * i,), generator=generator)) for i, text in enumerate(texts)
    ]


def test_one_pass_meets_every_text_once(spoken):
    batches = SpokenBatches(spoken, tokenizer(), batch_seconds=3.0)
    met = [row for step in range(len(batches)) for row in batches.batches.at(step)]
    assert sorted(met) == [0, 1, 2, 3]
    assert sum(batches(step)["seconds"] for step in range(len(batches))) == sum(s.seconds for s in spoken)


def test_rows_hold_text_as_it_is_spoken_and_codes_with_zeros_behind(spoken):
    batches = SpokenBatches(spoken, tokenizer(), batch_seconds=3.0)
    batch = batches.batch([0, 2])
    ids = tokenizer().encode("hello.", add_special_tokens=False)  # clean_for_speech ends the sentence
    assert batch["text_ids"][0].tolist()[: len(ids)] == ids and batch["text_lengths"][0] == len(ids)
    assert batch["code_lengths"].tolist() == [20, 50] and batch["codes"].shape == (2, 50)
    assert (batch["codes"][0, :20] == spoken[0].codes).all() and not batch["codes"][0, 20:].any()
    assert "hidden_states" not in batch


def test_hidden_states_have_lengths_of_their_own(spoken):
    states = [torch.full((1 + i, 3), float(i)) for i in range(4)]
    batch = SpokenBatches(spoken, tokenizer(), 3.0, states=states).batch([1, 3])
    assert batch["hidden_lengths"].tolist() == [2, 4] and batch["hidden_states"].shape == (2, 4, 3)


def test_characters_stand_beside_their_tokens(spoken):
    batch = SpokenBatches(spoken, tokenizer(), batch_seconds=3.0).batch([0, 2])
    for row, place in enumerate((0, 2)):
        own = Speller(tokenizer())(batch["text_ids"][row, : batch["text_lengths"][row]].tolist())
        found = batch["characters"][row]
        assert torch.equal(found[: own.shape[0], : own.shape[1]], own) and found.sum() == own.sum(), place


def test_a_share_of_the_corpus_is_spread_evenly(spoken):
    assert part_of(spoken, 1.0) == spoken and part_of(spoken, 0.5, least=1) == spoken[::2]
    assert part_of(spoken, 0.01, least=1) == spoken[:1] and part_of(spoken, 0.01) == spoken


def test_recipe_is_that_of_the_corpus(spoken):
    def recipe(items, **settings):
        return SpokenBatches(items, tokenizer(), 3.0, **settings).recipe

    assert recipe(spoken) == recipe(list(spoken))
    other = [*spoken[:3], Spoken("no", spoken[3].codes.flip(0))]
    assert len({recipe(spoken), recipe(other), recipe(spoken, seed=2)}) == 3


def test_every_fifth_answer_is_kept_for_testing():
    items = [Spoken(str(i), torch.zeros(1), question="why?" if i > 3 else "") for i in range(11)]
    train, test = hold_out_answers(items)
    assert [item.text for item in test] == ["4", "9"]
    assert [item.text for item in train] == ["0", "1", "2", "3", "5", "6", "7", "8", "10"]


def test_what_the_llm_wrote_survives_the_shard(tmp_path):
    line = Line("It has two legs.", "How many?", written="It has 2 legs.")
    path = tmp_path / "shard-00000.safetensors"
    speech_tokens.write_shard(path, [torch.arange(5)], speech_tokens.describe([line], "codec"))
    (item,) = speech_tokens.read_shards(tmp_path, "codec")
    assert (item.text, item.question, item.written) == (line.text, line.question, line.written)
