import tiny
import torch

from freeze_omni_lite.frozen_llm import IGNORE
from freeze_omni_lite.turns import Row, join, speech_states


def test_each_answer_token_is_predicted_by_the_position_before_it():
    llm = tiny.llm()
    row = Row(llm).tokens([1, 4]).spoken(torch.zeros(3, llm.width)).tokens([1, 6]).answer([10, 11, 12], end=2)
    assert row.labels == [IGNORE] * 6 + [10, 11, 12, 2]
    assert row.speech == [(2, 3)] and row.answers == [(7, 3)]


def test_second_turn_and_open_end():
    llm = tiny.llm()
    row = Row(llm).tokens([1]).answer([9], end=2).tokens([2, 3]).answer([8, 7], end=None)
    assert row.labels == [9, 2, IGNORE, 8, 7, IGNORE]
    assert Row(llm).tokens([1, 1]).answer([], end=2).labels == [IGNORE, 2]


def test_padded_batch_equals_single_rows():
    llm = tiny.llm()
    rows = [Row(llm).tokens(list(range(4, 4 + n))).answer([9, 8], end=2) for n in (3, 7)]
    both = join(rows)
    hidden = llm.hidden(both.vectors)
    for i, row in enumerate(rows):
        single = join([row])
        assert torch.allclose(hidden[i, : len(row)], llm.hidden(single.vectors)[0], atol=1e-5)
        assert both.labels[i, len(row) :].eq(IGNORE).all()


def test_speech_states_are_cut_out_in_order():
    llm = tiny.llm()
    rows = [
        Row(llm).tokens([1]).spoken(torch.zeros(2, llm.width)).tokens([5]).spoken(torch.zeros(3, llm.width))
    ]
    hidden = torch.arange(7.0).view(1, 7, 1)
    assert [s[:, 0].tolist() for s in speech_states(hidden, rows)] == [[1, 2], [4, 5, 6]]
