import tiny
import torch

from freeze_omni_lite.frozen_llm import IGNORE
from freeze_omni_lite.text import ChatLayout
from freeze_omni_lite.turns import Row, answer_dialogues, join, speech_states, transcript_row, written


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


def test_a_transcript_row_ends_where_the_llm_begins_to_write():
    llm = tiny.llm()
    layout = ChatLayout([1], [2, 3], [4, 5], [2])
    task, vectors = torch.randn(2, llm.width), torch.randn(3, llm.width)
    row = transcript_row(llm, layout, task, vectors)
    wanted = torch.cat([llm.embed([1, 2, 3]), task, vectors, llm.embed([4, 5])])
    assert torch.equal(torch.cat(row.vectors), wanted) and row.speech == [(5, 3)]
    first = llm.logits(llm.hidden(wanted[None])[0, -1]).argmax()
    assert written(row, 1) == ("" if int(first) in llm.end_tokens else llm.tokenizer.decode([first]).strip())


def test_dialogue_answers_see_the_turns_before_them():
    llm = tiny.llm()
    layout = ChatLayout.from_tokenizer(llm.tokenizer, "you are helpful")
    dialogues = [["what is red ?"], ["hello", "what is the capital of france ?"]]
    answers = answer_dialogues(llm, layout, dialogues, 5)
    assert [len(turns) for turns in answers] == [1, 2]
    (first, end), (second, _) = answers[1]
    context = layout.system
    for question, answer in zip(dialogues[1], (first, []), strict=True):
        context = context + layout.user + llm.tokenizer.encode(question) + layout.assistant + answer
    alone = llm.answers([context], 5)[0]
    assert second == alone[: len(second)] and (len(alone) < 5 or second)
    assert end in (None, layout.end_of_turn[0])
