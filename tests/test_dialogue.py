"""One session on random parts: the order of events, what stays in the caches, and that packet sizes do not matter."""

import pytest
import tiny
import torch

from freeze_omni_lite import scales, verbs
from freeze_omni_lite.adapter import Adapter, PromptEmbedding, TaskEmbedding
from freeze_omni_lite.audio import CHUNK_MS, CHUNK_SAMPLES, LogMel
from freeze_omni_lite.codec import Codec
from freeze_omni_lite.dialogue import Session, finish, respond, run
from freeze_omni_lite.duplex import DialogueState, StateHead
from freeze_omni_lite.encoder import CTCHead, Encoder
from freeze_omni_lite.errors import InputError, StageMismatch
from freeze_omni_lite.frozen_llm import LLMCache
from freeze_omni_lite.speech_decoder import PrefixDecoder, SpeechDecoder
from freeze_omni_lite.system import System
from freeze_omni_lite.text import ChatLayout, CTCUnits


class RandomStage:
    def __init__(self, name):
        self.preset = scales.load(name, "tiny")


class RandomSystem(System):
    """Every part at tiny shape with random weights; the head always says what `p` holds."""

    def __init__(self):
        torch.manual_seed(0)
        self.device = torch.device("cpu")
        self.llm = tiny.llm()
        self.layout = self.transcript_layout = ChatLayout.from_tokenizer(
            self.llm.tokenizer, "you are helpful"
        )
        self.features = LogMel()
        self.encoder = self.stage1_encoder = self.ready(Encoder.from_preset(self.stage("encoder_ctc").preset))
        self.units = CTCUnits()
        self.ctc_head = self.stage1_ctc_head = self.ready(CTCHead(self.encoder.width, len(self.units)))
        rms = self.llm.embedding_rms
        adapter = Adapter.from_preset(
            self.stage("encoder_adapter").preset, self.encoder.width, self.llm.width, rms
        )
        self.adapter = self.ready(adapter)
        self.task_embedding = self.ready(TaskEmbedding(4, self.llm.width))
        self.prompt_embedding = self.ready(PromptEmbedding(25, self.llm.width))
        self.state_head = self.ready(StateHead(self.llm.width))
        self.codec = self.ready(Codec.from_preset(self.stage("codec").preset))
        decoder = SpeechDecoder.from_preset(self.stage("decoder_nar_ar").preset, 64, self.llm.width)
        self.speech_decoder = self.ready(decoder)
        prefix = PrefixDecoder.from_preset(self.stage("decoder_prefix").preset, decoder, self.llm.width)
        self.prefix_decoder = self.ready(prefix)
        self.answer_with(0)

    def stage(self, name):
        return RandomStage(name)

    def provenance(self):
        return {}

    def answer_with(self, state):
        self.state_head.linear.weight.zero_()
        self.state_head.linear.bias.copy_(torch.nn.functional.one_hot(torch.tensor(state), 3) * 10.0)


class ScriptedGate:
    """Speech wherever the chunk is not silent."""

    silence_ms = 0

    def step(self, samples):
        speech = bool(samples.abs().max() > 0)
        self.silence_ms = 0 if speech else self.silence_ms + CHUNK_MS
        return speech

    def reset(self):
        self.silence_ms = 0

    def remember(self):
        return {"silence_ms": torch.tensor(self.silence_ms)}

    def restore(self, known):
        self.silence_ms = int(known["silence_ms"])


@pytest.fixture(scope="module")
def system():
    return RandomSystem()


@pytest.fixture(autouse=True)
def scripted_gate(monkeypatch):
    monkeypatch.setattr("freeze_omni_lite.dialogue.SpeechGate", ScriptedGate)


def recording(silent=3, voiced=5, silent_after=2):
    noise = torch.randn(voiced * CHUNK_SAMPLES, generator=torch.Generator().manual_seed(1)) * 0.1
    return torch.cat([torch.zeros(silent * CHUNK_SAMPLES), noise, torch.zeros(silent_after * CHUNK_SAMPLES)])


def kinds(events):
    return [event.kind for event in events]


def test_every_chunk_has_a_state_also_before_the_gate_opens(system):
    system.answer_with(0)
    states = [e.data for e in Session(system).feed(recording()) if e.kind == "state"]
    assert [s["t_ms"] for s in states] == [CHUNK_MS * (i + 1) for i in range(10)]
    assert [s["state"] for s in states] == [None] * 3 + [0] * 7
    assert states[0]["p0"] is None and states[5]["p0"] > 0.99


def test_packet_size_changes_nothing(system):
    system.answer_with(0)
    audio = recording()
    whole = list(respond(Session(system), audio))
    session = Session(system)
    pieces = [event for piece in audio.split(333) for event in respond(session, piece)]
    assert [(e.kind, e.t_ms, e.data) for e in pieces] == [(e.kind, e.t_ms, e.data) for e in whole]


def test_an_ignored_turn_leaves_the_conversation_as_it_was(system):
    system.answer_with(2)
    session = Session(system)
    before = session.cache.length
    events = list(session.feed(recording()))
    assert kinds(events).count("closed") >= 1
    assert session.cache.length == before
    assert "audio" not in kinds(events)


def test_the_answer_comes_after_the_decision_and_stays_in_the_context(system):
    system.answer_with(1)
    session = Session(system)
    events = list(respond(session, recording(voiced=1, silent_after=0)))
    order = [k for k in kinds(events) if k != "state"]
    assert order[:2] == ["opened", "closed"] and order[-1] == "answered"
    assert events[kinds(events).index("closed")].data["state"] == DialogueState.TAKE_TURN
    s = system
    look_back_and_turn = 2 * 4
    expected = len(s.layout.system) + len(s.layout.user) + 25 + look_back_and_turn + len(s.layout.assistant)
    answer = session.cache.length - expected
    assert 0 <= answer <= s.stage("encoder_prompt").preset.answer_tokens


def test_two_sessions_share_no_state(system):
    system.answer_with(0)
    audio = recording()
    alone = [e.data for e in Session(system).feed(audio)]
    one, two = Session(system), Session(system)
    mixed = []
    for piece in audio.split(CHUNK_SAMPLES):
        mixed.extend(e.data for e in one.feed(piece))
        list(two.feed(torch.randn(CHUNK_SAMPLES)))
    assert mixed == alone


def test_silence_drops_an_undecided_turn(system):
    system.answer_with(0)
    session = Session(system)
    events = list(session.feed(recording(silent_after=14)))
    closed = [e for e in events if e.kind == "closed"]
    assert len(closed) == 1 and closed[0].data["state"] == DialogueState.NO_RESPONSE
    assert closed[0].t_ms == CHUNK_MS * (3 + 5 + 13), "2 s of silence end in the 13th chunk"


def test_thresholds_of_a_session_win_over_the_preset(system):
    system.answer_with(1)
    patient = Session(system, thresholds=(1.0, 1.0))
    assert "closed" not in kinds(list(patient.feed(recording())))
    patient.thresholds = (1.0, 0.0)  # moved while a turn is open: the next chunk is dropped
    closed = [e for e in patient.feed(torch.zeros(CHUNK_SAMPLES)) if e.kind == "closed"]
    assert [e.data["state"] for e in closed] == [DialogueState.NO_RESPONSE]


@pytest.mark.parametrize(("end_of_file", "outcome"), [("force", "answered"), ("wait", "ignored")])
def test_talk_at_the_end_of_the_file(system, end_of_file, outcome):
    system.answer_with(0)
    turn = verbs.talk(system, recording(silent_after=0), end_of_file=end_of_file)
    assert (turn.trace["outcome"], turn.trace["forced"]) == (outcome, end_of_file == "force")
    assert turn.trace["latency_ms"]["end_of_speech_to_decision"] is None
    assert len(turn.trace["states"]) == 8 + 13


def test_talk_of_silence(system):
    turn = verbs.talk(system, torch.zeros(16_000))
    assert turn.trace["outcome"] == "no_speech" and len(turn.audio) == 0 and turn.trace["text"] == ""


def test_a_decision_is_not_forced(system):
    system.answer_with(1)
    turn = verbs.talk(system, recording())
    assert turn.trace["outcome"] == "answered" and not turn.trace["forced"]
    assert turn.trace["latency_ms"]["end_of_speech_to_decision"] is not None


def test_nothing_to_say_and_nothing_to_ask(system):
    with pytest.raises(InputError, match="nothing to say"):
        verbs.speak(system, " ... ")
    with pytest.raises(InputError, match="empty"):
        verbs.ask(system, "  ")


# ---- listening while speaking ----------------------------------------------------------------------------------------


def voiced(chunks=1, seed=2):
    return torch.randn(chunks * CHUNK_SAMPLES, generator=torch.Generator().manual_seed(seed)) * 0.1


def silence(chunks=1):
    return torch.zeros(chunks * CHUNK_SAMPLES)


TEXT = "the capital of france is paris . rome is the capital of red . you are helpful ."


@pytest.fixture
def talkative(system, monkeypatch):
    """The LLM writes TEXT, each sentence is spoken with a fixed number of tokens."""
    ids = system.llm.tokenizer.encode(TEXT, add_special_tokens=False)

    def generate(hidden, cache, max_tokens, **_):
        for token in ids:
            yield token, hidden[0, -1]
            hidden = system.llm.step(token, cache)

    monkeypatch.setattr(system.llm, "generate", generate)
    codes = lambda *_, **__: iter(range(60))  # noqa: E731
    monkeypatch.setattr(system.speech_decoder, "generate", codes)
    return ids


def speaking(system, chunks=0, **options):
    """A session that has taken its first turn, made the whole answer and was told that some of it was played."""
    system.answer_with(1)
    session = Session(system, **options)
    events = list(respond(session, torch.cat([silence(6), voiced()])))
    assert kinds(events)[-1] == "answered"
    session.played(chunks * 3840)
    return session


def fresh_states(session, rows):
    """Last hidden state and length of a fresh conversation of these vectors, read at once."""
    cache = session.system.llm.new_cache()
    return session.system.llm.prefill(torch.cat(rows)[None], cache)[0, -1], cache


def same_cache(one, two):
    assert one.length == two.length
    for a, b in zip(one.layers, two.layers, strict=True):
        for x, y in zip(a.entries.view(), b.entries.view(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def conversation(session):
    """All that the context should hold, from the exchanges."""
    context = session.context
    return [context.system_text[0], *(context.vectors_of(exchange) for exchange in context.exchanges)]


def test_feeding_never_makes_any_of_the_answer(system, talkative):
    system.answer_with(1)
    session = Session(system)
    events = session.feed(torch.cat([voiced(), silence(9)]))
    assert not {"text", "audio", "segment"} & set(kinds(events)) and session.busy
    first = session.advance()
    assert kinds(first) == ["text"] and session.t_ms == 10 * CHUNK_MS
    while session.busy:
        session.advance()
    assert session.advance() == []


def test_an_interruption_flushes_once_and_keeps_what_was_heard(system, talkative):
    session = speaking(system, chunks=4)
    events = list(respond(session, torch.cat([silence(2), voiced(seed=3)])))
    session.played(10**9, turn=1)  # a late report about the first answer
    order = [kind for kind in kinds(events) if kind not in ("state", "text", "segment", "audio")]
    assert order == ["opened", "closed", "flush", "interrupted", "answered"]
    assert [e.turn for e in events if e.kind in ("opened", "closed", "flush")] == [2, 2, 1]
    assert {e.turn for e in events[kinds(events).index("flush") + 2 :]} == {2}, "nothing stale follows"
    cut = next(e.data for e in events if e.kind == "interrupted")
    # 4 of 9.375 chunks of the first sentence (60 tokens, 36,000 samples), 33 characters long
    assert TEXT.replace(" .", ".").startswith(cut["text"]) and 0.3 < len(cut["text"]) / 33 < 0.45
    assert session.context.exchanges[0].answer == talkative[: cut["tokens"]]


def test_the_context_after_an_interruption_equals_a_fresh_prefill(system, talkative):
    session = speaking(system, chunks=4)
    list(respond(session, torch.cat([silence(2), voiced(3, seed=3)])))
    session.played(10**9)
    assert session.answer is None and len(session.context.exchanges) >= 2
    _, cache = fresh_states(session, conversation(session))
    same_cache(session.cache, cache)


def test_an_interruption_before_the_first_word_leaves_a_well_formed_context(system, talkative):
    system.answer_with(1)
    session = Session(system)
    session.feed(voiced())
    session.feed(silence(7))  # nothing is made meanwhile, and it is too late to go on
    events = session.feed(voiced(seed=3))
    assert kinds(events)[-4:] == ["state", "closed", "flush", "interrupted"]
    assert [exchange.answer for exchange in session.context.exchanges] == [[], []]
    while session.busy:
        session.advance()
    session.played(10**9)
    _, cache = fresh_states(session, conversation(session))
    same_cache(session.cache, cache)


def test_what_is_ignored_during_playback_changes_nothing(system, talkative):
    session = speaking(system, chunks=1)
    before, length = session.answer, session.cache.length
    system.answer_with(2)
    events = session.feed(torch.cat([voiced(seed=3), silence(1)]))
    assert [k for k in kinds(events) if k != "state"] == ["opened", "closed", "ignored"]
    assert session.answer is before and session.cache.length == length
    session.played(10**9)
    _, cache = fresh_states(session, conversation(session))
    same_cache(session.cache, cache)


def test_one_fork_for_each_turn_heard_during_playback(system, talkative, monkeypatch):
    forks, fork = [], LLMCache.fork
    monkeypatch.setattr(LLMCache, "fork", lambda self, n=None: forks.append(n) or fork(self, n))
    session = speaking(system, chunks=1)
    system.answer_with(0)
    list(respond(session, voiced(8)))
    assert len(forks) == 1 and forks[0] <= session.cache.length


def test_listening_goes_on_while_the_answer_is_made(system, talkative):
    """The states of a turn heard during an answer are those of a conversation that stops at what was heard."""
    session = speaking(system, chunks=4)
    system.answer_with(0)
    heard = session.answer.heard()
    session.feed(voiced(4, seed=3))
    context = session.context
    context.exchanges[-1].answer = talkative[:heard]
    rows = [*conversation(session), context.opening, *session.turn.vectors]
    _, cache = fresh_states(session, rows)
    same_cache(session.turn.cache, cache)


def test_going_on_before_anything_is_heard_reopens_the_turn(system, talkative):
    system.answer_with(1)
    session = Session(system)
    session.feed(voiced())
    session.advance()
    system.answer_with(0)
    events = session.feed(torch.cat([silence(2), voiced(2, seed=3)]))
    assert [k for k in kinds(events) if k != "state"] == ["reopened"], "nothing was given: nothing to flush"
    assert session.turn.number == 1 and not session.busy and session.context.exchanges == []
    whole = Session(system)
    whole.feed(torch.cat([voiced(), silence(2), voiced(2, seed=3)]))
    same_cache(session.cache, whole.cache)
    system.answer_with(1)
    events = list(respond(session, silence()))
    assert kinds(events)[1] == "closed" and events[1].turn == 1 and kinds(events)[-1] == "answered"


def test_sound_that_was_given_but_not_played_is_flushed_when_a_turn_reopens(system, talkative):
    system.answer_with(1)
    session = Session(system)
    list(respond(session, voiced()))
    session.played(0)
    events = session.feed(voiced(seed=3))
    assert [k for k in kinds(events) if k != "state"][:2] == ["flush", "reopened"]


def test_who_speaks_after_the_answer_does_not_interrupt(system, talkative):
    session = speaking(system, chunks=1000)
    assert session.answer is None
    events = session.feed(voiced(seed=3))
    assert not {"flush", "interrupted", "reopened"} & set(kinds(events))


def test_without_a_player_time_plays(system, talkative):
    session = Session(system)
    system.answer_with(1)
    list(respond(session, voiced()))
    system.answer_with(0)
    samples = session.answer.emitted
    list(respond(session, silence(samples // 3840)))
    assert session.answer is not None and session.answer.played == samples // 3840 * 3840
    session.feed(silence())
    assert session.answer is None


def test_old_turns_are_forgotten_when_the_context_is_crowded(system, talkative):
    system.answer_with(1)
    session, lengths = Session(system, context_positions=300), []
    for number in range(8):
        list(respond(session, torch.cat([silence(6), voiced(seed=number)])))
        session.played(10**9)
        lengths.append(session.cache.length)
        list(finish(session))
        assert session.cache.length <= 0.75 * 300
    assert max(lengths) > 0.75 * 300, "it was crowded, and so were turns forgotten"
    kept = session.context.exchanges
    assert 1 <= len(kept) < 8 and kept[-1].answer == talkative
    _, cache = fresh_states(session, conversation(session))
    same_cache(session.cache, cache)


def test_a_turn_without_end_is_dropped_when_the_context_is_full(system):
    system.answer_with(0)
    session = Session(system, context_positions=128)
    closed = [e.data for e in session.feed(voiced(60)) if e.kind == "closed"]
    assert closed and {row["reason"] for row in closed} == {"full"} and session.cache.length <= 128


@pytest.mark.parametrize("after", [0, 5, 7, 9, 12])
def test_a_saved_session_goes_on_as_if_nothing_had_happened(system, tmp_path, after):
    audio = torch.cat([silence(4), voiced(4), silence(6), voiced(3, seed=3), silence(2)])
    system.answer_with(0)
    session = Session(system, timeout_ms=480, thresholds=(0.9, 0.8))
    session.feed(audio[: after * CHUNK_SAMPLES + 100])
    session.save(tmp_path / "s.safetensors")
    loaded = Session.load(system, tmp_path / "s.safetensors")
    assert (loaded.timeout_ms, loaded.thresholds) == (480, (0.9, 0.8))
    rest = audio[after * CHUNK_SAMPLES + 100 :]
    one, two = session.feed(rest), loaded.feed(rest)
    assert [(e.kind, e.t_ms, e.turn) for e in one] == [(e.kind, e.t_ms, e.turn) for e in two]
    for a, b in zip(one, two, strict=True):
        if a.kind == "state" and a.data["state"] is not None:
            assert [a.data[p] for p in ("p0", "p1", "p2")] == pytest.approx(
                [b.data[p] for p in ("p0", "p1", "p2")], abs=2e-4
            )
    same_cache(session.cache, loaded.cache)


def test_an_answer_is_saved_as_far_as_it_was_heard(system, talkative, tmp_path):
    session = speaking(system, chunks=4)
    heard = session.answer.heard()
    loaded = Session.load(system, session.save(tmp_path / "s.safetensors"))
    assert loaded.context.exchanges[0].answer == talkative[:heard] and loaded.answer is None
    assert session.answer is not None, "the live one goes on"


def test_what_is_no_session_is_refused(system, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"hello")
    with pytest.raises(InputError, match="no saved session"):
        Session.load(system, tmp_path / "s.safetensors")
    path = Session(system).save(tmp_path / "t.safetensors")
    other = RandomSystem()
    other.llm.name = "another"
    with pytest.raises(StageMismatch, match="another"):
        Session.load(other, path)


def test_the_loop_hands_over_every_event_in_order(system, talkative):
    system.answer_with(1)
    nothing, found = torch.zeros(0), []
    run(Session(system), [voiced(), *[nothing] * 3, silence(), nothing], found.append)
    assert kinds(found)[:3] == ["opened", "state", "closed"] and kinds(found)[-1] == "answered"
    times = [event.t_ms for event in found]
    assert times == sorted(times) and set(times) == {CHUNK_MS, 2 * CHUNK_MS}


def test_an_hour_of_talk_does_not_grow(system, monkeypatch):
    """Turn after turn: every cache, list and queue of the session keeps its size."""
    system.answer_with(2)
    session, sizes = Session(system), []
    for number in range(30):
        session.feed(torch.cat([voiced(2, seed=number), silence(8)]))
        sizes.append((session.cache.nbytes(), len(session.look_back), len(session.waiting)))
    assert len(set(sizes[5:])) == 1 and session.turns >= 30
