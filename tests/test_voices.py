"""Voices: reserved ones stay out, the engines run in processes of their own, failures are sentences."""

import subprocess
import sys

import numpy as np
import pytest

from freeze_omni_lite import voices
from freeze_omni_lite.errors import InputError, PartMissing
from freeze_omni_lite.voices import ANSWER_VOICE, ESPEAK, HIBARI, NATIVE_RATE_HZ, Voice

TEXT = "The green kettle costs nineteen dollars."
needs_espeak = pytest.mark.skipif(not voices.available(ESPEAK), reason="espeakng-loader is not installed")
needs_hibari = pytest.mark.skipif(not voices.available(HIBARI), reason="hibari-tts is not installed")


def test_reserved_voices_are_nowhere():
    names = voices.TRAIN_VOICES + voices.TEST_VOICES
    assert not [name for name in names if voices.is_reserved(name)]
    for reserved in ("en-us+adam", "en+m8", "en-us+f5", "en-gb-x-rp+m1", "en-gb-x-rp", "en-us+iven2"):
        assert voices.is_reserved(reserved)


def test_there_are_enough_voices_and_the_splits_never_meet():
    assert len(set(voices.TRAIN_VOICES)) == len(voices.TRAIN_VOICES) >= 24
    variants = [{name.split("+")[1] for name in names} for names in (voices.TRAIN_VOICES, voices.TEST_VOICES)]
    assert variants[1] and not variants[0] & variants[1]


@needs_espeak
def test_every_listed_voice_speaks_at_a_sound_level():
    names = voices.TRAIN_VOICES + voices.TEST_VOICES
    spoken = list(voices.speak_many([(TEXT, Voice(ESPEAK, name)) for name in names], workers=1))
    for name, samples in zip(names, spoken, strict=True):
        seconds = len(samples) / NATIVE_RATE_HZ[ESPEAK]
        assert 1.2 < seconds < 5, f"{name}: {seconds:.2f} s"
        assert np.sqrt(np.mean(samples.astype(float) ** 2)) > 300, f"{name} is too quiet"


@needs_espeak
def test_rate_and_pitch_change_the_speech_and_order_is_kept():
    requests = [
        (TEXT, Voice(rate=rate, pitch=pitch)) for rate, pitch in ((120, 50), (240, 50), (175, 90), (175, 10))
    ]
    slow, fast, high, low = voices.speak_many(requests, workers=2)
    assert len(slow) > 1.4 * len(fast)
    assert mean_frequency(high) > mean_frequency(low)


def mean_frequency(samples):
    """Centre of the spectrum below 1 kHz, Hz."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    hz = np.fft.rfftfreq(len(samples), 1 / NATIVE_RATE_HZ[ESPEAK])
    low = hz < 1000
    return (power[low] * hz[low]).sum() / power[low].sum()


@needs_hibari
def test_the_answer_voice_repeats_itself_exactly():
    first, second = (voices.speak(TEXT, ANSWER_VOICE) for _ in range(2))
    assert first.dtype == np.int16 and np.array_equal(first, second)
    assert 1.5 < len(first) / NATIVE_RATE_HZ[HIBARI] < 5


@needs_espeak
@pytest.mark.parametrize("name", ["en-us+nosuchvariant", "nosuchaccent"])
def test_an_unknown_voice_is_a_sentence(name):
    with pytest.raises(InputError, match=f"no voice '{name.replace('+', '.')}'"):
        voices.speak(TEXT, Voice(ESPEAK, name))


def test_a_missing_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(voices, "PACKAGES", {ESPEAK: ("no_such_module", "espeakng-loader")})
    with pytest.raises(PartMissing, match="pip install 'espeakng-loader'"):
        voices.speak(TEXT, Voice())
    with pytest.raises(InputError, match="no voice engine 'radio'"):
        voices.speak(TEXT, Voice("radio"))


def test_a_worker_that_dies_is_reported(monkeypatch):
    def dead():
        return subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(voices, "start_worker", dead)
    monkeypatch.setattr(voices, "require", lambda engine: None)
    with pytest.raises(PartMissing, match="stopped while speaking"):
        voices.speak(TEXT, Voice())


def test_importing_the_module_loads_no_engine():
    heavy = ("torch", "hibari", "espeakng_loader")
    code = f"import sys, freeze_omni_lite.voices as v; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
