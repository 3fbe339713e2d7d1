"""One session on random parts: the order of events, what stays in the caches, and that packet sizes do not matter."""

import pytest
import tiny
import torch

from freeze_omni_lite import scales, verbs
from freeze_omni_lite.adapter import Adapter, PromptEmbedding, TaskEmbedding
from freeze_omni_lite.audio import CHUNK_MS, CHUNK_SAMPLES, LogMel
from freeze_omni_lite.codec import Codec
from freeze_omni_lite.dialogue import Session, Stopwatch, batches, spoken_pieces
from freeze_omni_lite.duplex import DialogueState, StateHead
from freeze_omni_lite.encoder import CTCHead, Encoder
from freeze_omni_lite.errors import InputError
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
    whole = list(Session(system).feed(audio))
    session = Session(system)
    pieces = [event for piece in audio.split(333) for event in session.feed(piece)]
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
    events = list(session.feed(recording(voiced=1, silent_after=0)))
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


def test_states_go_with_the_segment_they_predicted(system):
    ids = system.llm.tokenizer.encode(
        "hello . the capital of france is paris . yes", add_special_tokens=False
    )
    pairs = [(token, torch.full((4,), float(i))) for i, token in enumerate(ids)]
    pieces = list(spoken_pieces(system, iter(pairs)))
    segments = [p for p in pieces if not isinstance(p, str)]
    numbers = [float(state[0]) for segment in segments for state in segment.states]
    assert numbers == [float(i) for i in range(len(ids))]
    assert "".join(p for p in pieces if isinstance(p, str)) == system.llm.tokenizer.decode(ids)


def test_first_piece_is_short():
    assert [len(b) for b in batches(iter(range(75)), (20, 40))] == [20, 40, 15]


def test_stopwatch_keeps_the_first_mark():
    watch = Stopwatch()
    watch.mark("a")
    first = watch.marks["a"]
    watch.mark("a")
    assert watch.marks["a"] == first and watch.between_ms("a", "b") is None
