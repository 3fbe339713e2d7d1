"""metrics.py: error rates of known cases, and a judge that says when it must not judge."""

import doctest
import math
from pathlib import Path

import pytest
import torch

from freeze_omni_lite import metrics, samples
from freeze_omni_lite.audio import SAMPLE_RATE_HZ, resample
from freeze_omni_lite.errors import InputError, PartMissing

DATA_SAMPLES = Path(__file__).resolve().parents[1] / "data_samples"
SPOKEN = ["Turn on the light in the kitchen.", "What is the capital of France?"]


@pytest.mark.parametrize(
    "reference, hypothesis, words, characters",
    [
        ("a b c", "a b c", 0, 0),
        ("A, b: c!", "a b c", 0, 0),
        ("a b c", "a x c", 1 / 3, 1 / 5),
        ("a b c", "a c", 1 / 3, 2 / 5),
        ("a b c", "a b b c", 1 / 3, 2 / 5),
        ("a b", "", 1, 1),
        ("stop", "please stop now", 2, 11 / 4),
        ("it is 3", "it is three", 0, 0),
    ],
)
def test_error_rates_of_known_cases(reference, hypothesis, words, characters):
    assert metrics.wer([reference], [hypothesis]) == pytest.approx(words)
    assert metrics.cer([reference], [hypothesis]) == pytest.approx(characters)


def test_a_corpus_is_weighed_by_its_words():
    assert metrics.wer(["a b c d", "e"], ["a b c d", "x"]) == pytest.approx(1 / 5)
    assert metrics.wer(["a b", "..."], ["a b", "c"]) == pytest.approx(1 / 2)  # heard where nothing was said
    with pytest.raises(InputError, match="2 references but 1 hypotheses"):
        metrics.wer(["a", "b"], ["a"])
    with pytest.raises(InputError, match="no reference holds a word"):
        metrics.wer(["..."], ["a"])


def test_doctests():
    assert doctest.testmod(metrics).failed == 0


def test_perplexity_bounds():
    assert metrics.perplexity(torch.zeros(9, dtype=torch.long)) == 1
    codes = torch.randint(0, 64, (1000,))
    assert 50 < metrics.perplexity(codes) <= 64
    padded = torch.nn.functional.pad(codes, (0, 500), value=-1)
    assert metrics.perplexity(padded) == metrics.perplexity(codes)
    with pytest.raises(InputError):
        metrics.perplexity(torch.full((3,), -1))


def test_confusion_recall_precision():
    truth = torch.tensor([[0, 0, 0, 1], [1, 0, -1, -1]])
    guess = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2]])
    matrix = metrics.confusion(truth, guess)
    assert matrix.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    table = metrics.recall_precision(matrix)
    assert table["keep_listening"] == {"recall": 0.75, "precision": 0.75, "count": 4}
    assert table["take_turn"] == {"recall": 0.5, "precision": 0.5, "count": 2}
    assert table["no_response"] == {"recall": None, "precision": None, "count": 0}


def test_latency_of_nothing_is_nothing():
    assert metrics.latency_summary([None]) == {"mean": None, "p50": None, "p90": None, "count": 0}


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_log_mel_distance(rate):
    time = torch.arange(rate) / rate
    tone = 0.5 * torch.sin(2 * math.pi * 440 * time) + 0.01 * torch.randn(rate)
    assert metrics.log_mel_distance(tone, tone, rate) == 0
    assert metrics.log_mel_distance(tone, tone / 10, rate) == pytest.approx(20, abs=1)  # a tenth is -20 dB
    noise = 0.5 * torch.randn(rate)
    near = metrics.log_mel_distance(tone, tone + 0.001 * noise, rate)
    assert near < metrics.log_mel_distance(tone, noise[: rate // 2], rate)
    with pytest.raises(InputError, match="too short"):
        metrics.log_mel_distance(tone[:10], tone, rate)


class Deaf(metrics.Judge):
    """Hears one given sentence, whatever is said."""

    def __init__(self, always: str) -> None:
        super().__init__("deaf")
        self.always = always

    def transcribe(self, waveform):
        return self.always


def test_a_judge_decides_only_after_calibration():
    judge = Deaf("turn left")
    assert judge.require() == "not measured: the judge deaf was not calibrated on the originals"
    assert judge.calibrate([torch.zeros(10)] * 2, ["turn left", "turn right"]) == 0.25
    assert judge.require().startswith(
        "not measured: the judge deaf gets 25.0% of the words wrong on the originals"
    )
    assert judge.require(limit=0.3) == "" and judge.facts() == {"name": "deaf", "own_error": 0.25}


def test_a_wanted_judge_is_never_replaced(monkeypatch, tmp_path):
    with pytest.raises(PartMissing, match="judge"):
        metrics.Judge.best(str(tmp_path / "no_model"))
    monkeypatch.setenv("FREEZE_OMNI_JUDGE", str(tmp_path / "no_model"))
    with pytest.raises(PartMissing, match="judge"):
        metrics.Judge.best()
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(PartMissing, match="pip install pocketsphinx"):
        metrics.Judge.best("pocketsphinx")


def test_the_judge_in_the_wheel_hears_clean_speech(monkeypatch):
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("hibari")
    from freeze_omni_lite import voices

    monkeypatch.delenv("FREEZE_OMNI_JUDGE", raising=False)
    rate = voices.NATIVE_RATE_HZ[voices.HIBARI]
    voiced = [torch.from_numpy(voices.speak(text).astype("float32") / 32768) for text in SPOKEN]
    spoken = [resample(waveform, rate, SAMPLE_RATE_HZ) for waveform in voiced]
    judge = metrics.Judge.best()
    assert judge.name == "pocketsphinx" and judge.calibrate(spoken, SPOKEN) <= 0.25
    heard = [judge.transcribe(waveform) for waveform in spoken]
    assert [judge.transcribe(waveform) for waveform in reversed(spoken)] == heard[
        ::-1
    ]  # no memory between clips
    assert judge.transcribe(torch.zeros(100)) == judge.transcribe(torch.zeros(0))
    assert judge.wer([torch.zeros(1600)] * 2, SPOKEN) > 0.9


def test_dnsmos_says_why_it_is_not_measured(monkeypatch):
    metrics.dnsmos_network.cache_clear()
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    reason = metrics.no_dnsmos()
    assert reason.startswith("not measured: DNSMOS needs speechmos and onnxruntime")
    with pytest.raises(PartMissing, match="not measured: DNSMOS"):
        metrics.dnsmos([torch.zeros(16_000)])
    for nothing in ([], [torch.zeros(0)]):
        with pytest.raises(InputError, match="no sound to rate"):
            metrics.dnsmos(nothing)


@pytest.mark.skipif(bool(metrics.no_dnsmos()), reason="the package speechmos is not installed")
def test_dnsmos_prefers_speech_to_noisy_speech():
    metrics.dnsmos_network.cache_clear()
    torch.manual_seed(1)
    recording = samples.load_audio(samples.from_manifest(DATA_SAMPLES / "human.jsonl")[0])
    noisy = recording + 0.05 * torch.randn(len(recording))
    clean, disturbed = metrics.dnsmos([recording]), metrics.dnsmos([noisy])
    assert 1 < disturbed < clean - 0.3 < 5
    assert metrics.dnsmos([recording, noisy]) == pytest.approx((clean + disturbed) / 2)


def test_dnsmos_rates_every_second_of_a_long_clip_and_repeats_a_short_one():
    class Network:
        """Takes the mean of a window for its overall score."""

        def get_inputs(self):
            return [type("Input", (), {"name": "input_1"})]

        def run(self, _, inputs):
            (window,) = inputs["input_1"]
            assert window.shape == (metrics.DNSMOS_WINDOW_SAMPLES,)
            seen.append(float(window[0]))
            return [[[0.0, 0.0, 1.0]]]

    seen: list[float] = []
    score = metrics.dnsmos_overall(Network(), torch.full((20_000,), 0.25))
    assert seen == [0.25] and score == pytest.approx(sum(metrics.DNSMOS_OVERALL))
    seen.clear()
    metrics.dnsmos_overall(Network(), torch.arange(200_000) / 400_000)  # 12.5 s
    assert seen == pytest.approx([second * 16_000 / 400_000 for second in range(4)])
