"""The real gate: speech opens it, blips of 60 ms do not, and what it remembers can be handed on."""

import pytest
import torch

from freeze_omni_lite import audio, stages
from freeze_omni_lite.audio import CHUNK_SAMPLES
from freeze_omni_lite.vad import SpeechGate, opening

QUESTIONS = sorted((stages.root() / "data_samples" / "questions").glob("*.wav"))


@pytest.fixture(scope="module")
def gate():
    return SpeechGate()


def test_speech_opens_the_gate_and_blips_of_it_do_not(gate):
    assert QUESTIONS
    for number, path in enumerate(QUESTIONS):
        speech = audio.load(path)
        assert opening(speech, gate) is not None
        onset = int((speech.abs() > 0.1 * speech.abs().max()).nonzero()[0])
        for place in range(4):
            blip, at = torch.zeros(6 * CHUNK_SAMPLES), 2 * CHUNK_SAMPLES + 431 * (number + place)
            blip[at : at + 960] = speech[onset + 4000 * place :][:960]
            assert opening(blip, gate) is None, f"{path.name}, blip {place}"


def test_what_the_gate_remembers_can_be_handed_on(gate):
    chunks = audio.pad_to_chunks(audio.load(QUESTIONS[0])).split(CHUNK_SAMPLES)
    gate.reset()
    other = SpeechGate()
    for chunk in chunks[:4]:
        gate.step(chunk)
    other.restore(gate.remember())
    following = [[g.step(chunk) for chunk in chunks[4:]] for g in (gate, other)]
    assert following[0] == following[1] and other.silence_ms == gate.silence_ms
    for name, value in gate.remember().items():
        assert torch.equal(value, other.remember()[name]), name
