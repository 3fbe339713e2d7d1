"""The simulated clock: what a listener hears and when, order and counts on random parts, and every scripted kind."""

import dataclasses

import pytest
import test_dialogue
import torch
from test_dialogue import silence, voiced

from freeze_omni_lite import conversation, scenarios
from freeze_omni_lite.audio import CHUNK_SAMPLES
from freeze_omni_lite.dialogue import Event, Session
from freeze_omni_lite.duplex import Timeline
from freeze_omni_lite.scenarios import ALONE, DISTURBANCES, OVERLAPS, Played, plan_scenarios
from freeze_omni_lite.scenes import Made
from freeze_omni_lite.simulation import Load, Player, Simulation
from freeze_omni_lite.voices import ANSWER_VOICE, TEST_VOICES, is_reserved

scripted_gate = test_dialogue.scripted_gate  # autouse
talkative = test_dialogue.talkative


@pytest.fixture(scope="module")
def system():
    return test_dialogue.RandomSystem()


def sound(seconds, value=0.5):
    return torch.full((round(24_000 * seconds),), value)


def test_the_player_plays_from_the_moment_it_is_given_something():
    player = Player()
    player.handle(Event("audio", 0, sound(0.1), 1), 0.5)
    player.until(0.55)
    assert player.played == 1200 and player.starts == {1: 0.5} and player.sounding
    player.handle(Event("audio", 0, sound(0.1, 0.25), 1), 0.56)
    player.handle(Event("answered", 0, "", 1), 0.57)
    player.until(1.0)
    assert player.played == 4800 and player.underrun_seconds == 0 and not player.sounding
    track = player.track
    assert len(track) == 24_000 and not track[:12_000].any() and not track[12_000 + 4800 :].any()
    assert track[12_000:14_400].unique().tolist() == [0.5] and track[14_400:16_800].unique().tolist() == [
        0.25
    ]


def test_the_player_counts_the_silence_within_an_answer_only():
    player = Player()
    player.handle(Event("audio", 0, sound(0.1), 1), 1.0)
    player.handle(Event("audio", 0, sound(0.1), 1), 1.25)
    assert player.underrun_seconds == pytest.approx(0.15)
    player.handle(Event("answered", 0, "", 1), 1.3)
    player.until(3.0)
    assert player.underrun_seconds == pytest.approx(0.15)


def test_a_flush_is_silence_at_once():
    player = Player()
    player.handle(Event("audio", 0, sound(1), 1), 0.0)
    player.handle(Event("flush", 0, turn=1), 0.5)
    player.until(1.0)
    assert player.stops == [(1, 0.5)] and not player.track[12_000:].any() and player.underrun_seconds == 0
    assert torch.equal(player.heard(18_000)[:6_000], sound(0.25)) and not player.heard(18_000)[6_000:].any()


def test_an_interruption_in_a_simulation(system, talkative):
    system.answer_with(1)
    sim = Simulation(Session(system), pace=0)
    sim.hear(torch.cat([silence(6), voiced()]))
    sim.wait(0.6)
    assert sim.player.played == round(0.64 * 24_000), "computing took no time: it began with the decision"
    sim.hear(voiced(seed=3))
    (seconds, flush), (_, cut) = sim.events("flush", "interrupted")
    assert seconds == pytest.approx(sim.input_seconds) and flush.turn == 1 and cut.data["tokens"] > 0
    sim.wait(0.5)
    assert list(sim.player.starts) == [1, 2] and sim.player.stops == [(1, seconds)]


def test_computing_takes_time(system, talkative):
    system.answer_with(1)
    slow = Simulation(Session(system), pace=1000)
    slow.hear(torch.cat([silence(6), voiced()]))
    assert slow.seconds > slow.input_seconds
    assert slow.listening.spent > 0 and slow.listening.passed == pytest.approx(0.16)


def test_the_echo_is_what_was_played(system, talkative):
    system.answer_with(1)
    sim = Simulation(Session(system), pace=0, echo_db=-20)
    sim.hear(torch.cat([silence(6), voiced()]))
    system.answer_with(2)
    sim.wait(0.32)
    echo, played = sim.microphone[-1], sim.player.heard(3840)
    level = [float(sound.square().mean().sqrt()) for sound in (echo, played)]
    assert level[0] == pytest.approx(0.1 * level[1], rel=0.2) and level[0] > 0
    assert sim.events("ignored") and not sim.events("flush")


@pytest.mark.parametrize("kind", [*ALONE, *OVERLAPS, *DISTURBANCES])
def test_scenarios_are_planned_with_test_voices(kind):
    planned = plan_scenarios(kind, 3, 1)
    assert len(planned) == 3 and {one.kind for one in planned} == {kind}
    scenes = [scene for one in planned for scene in (one.first, one.then) if scene is not None]
    voices = {piece.voice for scene in scenes for piece in scene.pieces}
    assert all(v.name in TEST_VOICES and not is_reserved(v.name) for v in voices - {ANSWER_VOICE})
    assert ANSWER_VOICE not in voices
    if kind == "pause":
        assert all(len(one.first.pieces) == 2 for one in planned)
    if kind == "interruption":
        assert all(one.first.voice == one.then.voice for one in planned)


@pytest.fixture
def made(monkeypatch):
    """Scenes of one voiced chunk between silences."""
    waveform = torch.cat([silence(6), voiced(), silence(2)])
    timeline = Timeline(len(waveform) / 16_000, 7 * 0.16, True, True)
    monkeypatch.setattr(scenarios, "duplex_sample", lambda *_: Made(waveform, timeline, ((0.96, 1.119),)))
    monkeypatch.setattr(conversation, "voiced", lambda planned: planned)


def acted(system, monkeypatch, kind, state, count=1):
    system.answer_with(state)
    monkeypatch.setattr(conversation, "Simulation", lambda *a, **k: Simulation(*a, **k | {"pace": 0}))
    return conversation.act(system, kind, count, 1)


def test_a_turn_is_taken_or_not(system, talkative, made, monkeypatch):
    (taken,) = acted(system, monkeypatch, "turn", 1).played
    assert taken.began == pytest.approx(7 * 0.16) and not taken.early and taken.underrun == 0
    assert taken.decided is not None and all(value is not None for value in taken.parts.values())
    (dropped,) = acted(system, monkeypatch, "turn", 2).played
    assert dropped.began is None and dropped.parts == {}


@pytest.mark.parametrize(("kind", "state", "stops"), [("interruption", 1, True), ("background", 2, False)])
def test_what_happens_during_an_answer(system, talkative, made, monkeypatch, kind, state, stops):
    system.answer_with(state)
    (one,) = acted(system, monkeypatch, kind, state).played
    assert one.overlapped and one.opened >= 1
    assert (one.stopped is not None) == stops == (one.flushes == 1) == (one.began is not None)


def test_blips_are_sixty_milliseconds(made):
    scenario = plan_scenarios("blip", 1, 1)[0]
    waveform, _ = scenarios.disturbance(scenario, torch.Generator())
    assert waveform.count_nonzero() == 960 and len(waveform) == 9 * CHUNK_SAMPLES


def test_every_part_has_rows_with_reasons_for_gaps(system):
    nothing = Played("turn", (0.0, 1.0), None)
    rows = conversation.turn_rows(system, conversation.Stage([nothing], Load(), Load()))
    rows += conversation.interruption_rows(system, [nothing])
    rows += conversation.resumed_rows(system, {"background": [nothing]}, {"background": ""})
    figures = {row["what"]: row["figure"] for row in rows}
    assert figures["turns taken"] == 0 and figures["speaks on: background"] == 100
    assert figures["end of speech to decision, 90 %"].startswith("not measured: ")
    answered = dataclasses.replace(
        nothing, began=1.5, decided=200.0, parts={"decision to first sound": 300.0}
    )
    rows = conversation.turn_rows(system, conversation.Stage([answered], Load(0.1, 0.2), Load()))
    figures = {row["what"]: row["figure"] for row in rows}
    assert figures["end of speech to first sound, 50 %"] == pytest.approx(500)
    assert figures["decision to first sound, 50 %"] == 300
