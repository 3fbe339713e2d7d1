import torch

from freeze_omni_lite.audio import CHUNK_MS
from freeze_omni_lite.duplex import (
    DialogueState,
    StateHead,
    Timeline,
    chunk_states,
    decide,
    decision_chunk,
    label_chunks,
    state_loss,
)
from freeze_omni_lite.frozen_llm import IGNORE


def labels(last_voiced, chunks=30, complete=True, addressed=True):
    return label_chunks(Timeline(chunks * 0.16, last_voiced, complete, addressed), chunks).tolist()


def test_complete_question_takes_the_turn_once():
    # Voice ends at 1.00 s: the first chunk that ends at 1.16 s or later ends at 1.28 s (chunk 7).
    row = labels(1.00)
    assert row[:7] == [0] * 7 and row[7] == DialogueState.TAKE_TURN
    assert set(row[8:]) == {IGNORE}


def test_decision_is_never_early_and_never_a_chunk_late():
    for last_ms in range(100, 3000, 37):
        end_ms = (decision_chunk(last_ms / 1000, 160) + 1) * CHUNK_MS
        assert 160 <= end_ms - last_ms < 160 + CHUNK_MS


def test_not_addressed_is_ignored_at_the_same_place():
    row = labels(1.00, addressed=False)
    assert row[7] == DialogueState.NO_RESPONSE and row[:7] == [0] * 7


def test_broken_off_question_waits_two_seconds():
    row = labels(1.00, complete=False)
    # 3.00 s is due; the chunk that ends at 3.04 s is chunk 18
    assert row[:18] == [0] * 18 and row[18] == DialogueState.NO_RESPONSE


def test_recording_that_ends_too_early_has_no_decision():
    assert labels(1.00, chunks=7) == [0] * 7
    assert labels(1.00, chunks=15, complete=False) == [0] * 15


def test_ignore_is_asked_first():
    assert decide(torch.tensor([0.0, 0.0, 1.0])) is DialogueState.NO_RESPONSE
    assert decide(torch.tensor([0.2, 0.55, 0.25])) is DialogueState.TAKE_TURN
    assert decide(torch.tensor([0.4, 0.35, 0.25])) is DialogueState.KEEP_LISTENING
    assert decide(torch.tensor([0.0, 0.6, 0.4]), no_response_threshold=0.3) is DialogueState.NO_RESPONSE


def test_head_reads_the_last_vector_of_each_chunk():
    hidden = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 4)
    assert chunk_states(hidden)[0, :, 0].tolist() == [1, 3, 5, 7]
    assert StateHead(4)(chunk_states(hidden)).shape == (1, 4, 3)


def test_loss_leaves_ignored_chunks_out_and_weights_decisions():
    scores = torch.randn(1, 4, 3)
    some = state_loss(scores, torch.tensor([[0, 1, IGNORE, IGNORE]]), 4.0)
    logs = scores.log_softmax(-1)[0]
    assert torch.isclose(some, -(logs[0, 0] + 4 * logs[1, 1]) / 5)
