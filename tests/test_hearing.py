"""A turn heard at once is the turn that a live session hears: same chunks, same states, labels where they belong."""

import pytest
import test_dialogue
import torch

from freeze_omni_lite.audio import CHUNK_SAMPLES
from freeze_omni_lite.dialogue import Session
from freeze_omni_lite.duplex import Timeline, chunk_states
from freeze_omni_lite.frozen_llm import IGNORE
from freeze_omni_lite.hearing import Listener, chunk_labels


@pytest.fixture(autouse=True)
def scripted_gate(monkeypatch):
    for place in ("dialogue", "hearing"):
        monkeypatch.setattr(f"freeze_omni_lite.{place}.SpeechGate", test_dialogue.ScriptedGate)


@pytest.mark.parametrize("silent", [0, 3, 9])
def test_as_in_a_session(silent):
    system = test_dialogue.RandomSystem()
    system.state_head.linear.weight.normal_(std=0.05)  # keeps listening, but not the same way in every chunk
    recording = test_dialogue.recording(silent=silent)
    live = [e.data for e in Session(system).feed(recording) if e.kind == "state"]
    listener = Listener(system.features, system.encoder, system.adapter)
    heard = listener.hear(recording, Timeline(1.6, 1.28, True, True))
    assert (heard.opened, heard.first) == (silent, max(0, silent - 6))
    assert len(heard.vectors) == 2 * len(heard.labels) == 2 * (len(live) - heard.first)

    cache = system.llm.new_cache()
    start = [system.llm.embed(system.layout.system + system.layout.user), system.prompt_embedding(1)[0]]
    hidden = system.llm.prefill(torch.cat([*start, heard.vectors])[None], cache)[:, -len(heard.vectors) :]
    offline = system.state_head.probabilities(chunk_states(hidden))[0]
    for number, row in enumerate(live[heard.opened :], start=heard.opened - heard.first):
        assert offline[number].tolist() == pytest.approx([row["p0"], row["p1"], row["p2"]], abs=2e-4)


def test_a_gate_that_stays_shut():
    system = test_dialogue.RandomSystem()
    listener = Listener(system.features, system.encoder, system.adapter)
    assert listener.hear(torch.zeros(5 * CHUNK_SAMPLES), Timeline(0.8, 0.4, True, True)) is None


def test_replayed_chunks_carry_no_label():
    timeline = Timeline(3.2, 1.0, complete=True, addressed=True)  # decision on chunk 7
    assert chunk_labels(timeline, 10, first=1, opened=4).tolist() == [IGNORE] * 3 + [
        0,
        0,
        0,
        1,
        IGNORE,
        IGNORE,
    ]


def test_a_gate_that_opens_late_decides_at_once():
    timeline = Timeline(3.2, 1.0, complete=True, addressed=False)
    assert chunk_labels(timeline, 10, first=3, opened=9).tolist() == [IGNORE] * 6 + [2]


def test_ended_turn():
    system = test_dialogue.RandomSystem()
    listener = Listener(system.features, system.encoder, system.adapter)
    heard = listener.hear(test_dialogue.recording(silent=8), Timeline(2.4, 2.0, True, True)).until(10)
    assert heard.first == 2 and len(heard.labels) == 9 and len(heard.vectors) == 18
