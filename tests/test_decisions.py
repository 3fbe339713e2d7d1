"""A rehearsal decides what a live session decides, turn after turn; outcomes count each scene once."""

import pytest
import test_dialogue
import torch

from freeze_omni_lite.audio import CHUNK_MS
from freeze_omni_lite.decisions import Decision, Outcome, Rehearsal, first_decision, shares
from freeze_omni_lite.dialogue import Session
from freeze_omni_lite.duplex import DialogueState
from freeze_omni_lite.hearing import Heard

WAIT, TAKE, DROP = DialogueState


@pytest.fixture(autouse=True)
def scripted_gate(monkeypatch):
    for place in ("dialogue", "hearing"):
        monkeypatch.setattr(f"freeze_omni_lite.{place}.SpeechGate", test_dialogue.ScriptedGate)


def live(system, waveform, thresholds):
    """What a session's turns end with, up to its first answer."""
    found = []
    for event in Session(system, thresholds=thresholds).feed(waveform):
        if event.kind == "closed":
            found.append((event.data["state"], event.t_ms))
            if event.data["state"] == TAKE:
                break
    return found


def speech_with_pauses() -> torch.Tensor:
    return torch.cat([test_dialogue.recording(silent, 6, 3) for silent in (9, 2, 8)])


@pytest.mark.parametrize("thresholds", [(0.45, 0.45), (0.36, 0.9), (0.9, 0.36), (0.9, 0.9)])
def test_as_in_a_session(thresholds):
    system = test_dialogue.RandomSystem()
    system.state_head.linear.weight.normal_(std=0.1)
    system.state_head.linear.bias.zero_()
    waveform = speech_with_pauses()
    turns = Rehearsal(system, thresholds=thresholds).turns(waveform)
    decided = [(t.state, CHUNK_MS * (t.chunk + 1)) for t in turns if t.state is not WAIT]
    assert decided == live(system, waveform, thresholds)


def test_some_turns_are_dropped_and_the_next_answered():
    system = test_dialogue.RandomSystem()
    system.answer_with(DROP)
    waveform = speech_with_pauses()
    dropped = Rehearsal(system).turns(waveform)
    assert len(dropped) == 18 and {turn.state for turn in dropped} == {DROP}  # every voiced chunk opens anew
    system.answer_with(TAKE)
    assert Rehearsal(system).turns(waveform) == [Decision(TAKE, 9)]


def test_silence_ends_an_undecided_turn_as_in_a_session():
    system = test_dialogue.RandomSystem()
    waveform = test_dialogue.recording(silent=3, voiced=5, silent_after=14)
    (turn,) = Rehearsal(system).turns(waveform)
    assert [(turn.state, CHUNK_MS * (turn.chunk + 1))] == live(system, waveform, None)
    assert turn == Decision(DROP, 3 + 5 + 13 - 1)  # 2080 ms of silence
    (waiting,) = Rehearsal(system).turns(test_dialogue.recording())
    assert waiting == Decision(WAIT, 9)


def test_a_gate_that_stays_shut():
    assert Rehearsal(test_dialogue.RandomSystem()).turns(torch.zeros(20_000)) == []


def test_first_decision_skips_replayed_chunks():
    p = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]).float()
    heard = Heard(torch.zeros(8, 2), first=4, opened=5, labels=torch.zeros(4))
    assert first_decision(p, heard, 0.5, 0.5) == Decision(DROP, 6)
    assert first_decision(p[:2], heard, 0.5, 0.5) == Decision(WAIT, 5)


def test_outcomes():
    late = Outcome.of("plain", [Decision(TAKE, 9)], 1.5)
    early = Outcome.of("plain", [Decision(TAKE, 5)], 1.5)
    mended = Outcome.of("plain", [Decision(DROP, 5), Decision(TAKE, 9)], 1.5)
    shut = Outcome.of("plain", [], 1.5)
    assert late.delay_ms == pytest.approx(100) and early.delay_ms == pytest.approx(-540)
    assert [o.in_time for o in (late, early, mended, shut)] == [True, False, False, False]
    assert mended.answered and not mended.early and shut.delay_ms is None
    expected = {"answered": 0.25, "early": 0.25, "dropped": 0.25, "waiting": 0.25}
    assert shares([late, early, mended, shut]) == expected
    assert set(shares([]).values()) == {0.0}
