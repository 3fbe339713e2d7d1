"""What is measured: word errors, codebook use, dialogue states, latency, spectral distance; judges of words and sound.

Every intelligibility figure names its judge and the judge's own error on the originals: a bad ear must not pass for
bad speech, nor excuse it.
"""

import functools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .audio import SAMPLE_RATE_HZ, LogMel, resample
from .errors import InputError, PartMissing
from .threads import thread_count

STATES = ("keep_listening", "take_turn", "no_response")
DYNAMIC_RANGE_DB = 80.0
JUDGE_LIMIT = 0.03  # a judge that errs more often than this on originals decides nothing
DB_PER_NEPER_OF_POWER = 10 / math.log(10)
DNSMOS_WINDOW_SAMPLES = 144_160  # 9.01 s at 16 kHz: what the network takes
DNSMOS_OVERALL = (-0.06766283, 1.11546468, 0.04602535)  # its authors' fit from raw to listeners' scores


# ---- words -----------------------------------------------------------------------------------------------------------


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate of a corpus: substitutions, deletions and insertions over all reference words.

    Both sides are normalised first. Raises InputError if the lists differ in length or hold no reference word.

    >>> wer(["Turn left!", "stop"], ["turn left", "shop"])
    0.3333333333333333
    """
    import jiwer

    return jiwer.process_words(*aligned(references, hypotheses)).wer


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate of a corpus, spaces counted; otherwise as `wer`."""
    import jiwer

    return jiwer.process_characters(*aligned(references, hypotheses)).cer


def aligned(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[list[str], list[str]]:
    """Normalised pairs with something to score against."""
    from .text import normalize

    if len(references) != len(hypotheses):
        raise InputError(f"{len(references)} references but {len(hypotheses)} hypotheses: give one for each.")
    truth, heard = [normalize(text) for text in references], [normalize(text) for text in hypotheses]
    if not any(truth):
        raise InputError("no reference holds a word: an error rate needs at least one.")
    return truth, heard


# ---- codes, states, latency, spectra ---------------------------------------------------------------------------------


def perplexity(codes: Tensor) -> float:
    """How many codes are in even use: exp of the entropy of their frequencies; negative codes are padding.

    >>> perplexity(torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]))
    4.0
    """
    frequencies = torch.bincount(codes[codes >= 0].flatten().cpu()).double()
    if not frequencies.sum():
        raise InputError("no codes to measure: give at least one that is not padding.")
    shares = frequencies[frequencies > 0] / frequencies.sum()
    return round(float(torch.exp(-(shares * shares.log()).sum())), 9)


def confusion(reference: Tensor, predicted: Tensor, classes: int = len(STATES)) -> Tensor:
    """Counts (reference class, predicted class); places with a negative reference are left out."""
    reference, predicted = reference.flatten().cpu(), predicted.flatten().cpu()
    counted = reference >= 0
    cells = reference[counted] * classes + predicted[counted]
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def recall_precision(matrix: Tensor, names: Sequence[str] = STATES) -> dict[str, dict[str, float | None]]:
    """Per class: recall, precision and count of the reference; None where there is nothing to divide by."""

    def share(part: Tensor, whole: Tensor) -> float | None:
        return float(part / whole) if whole else None

    return {
        name: {
            "recall": share(matrix[i, i], matrix[i].sum()),
            "precision": share(matrix[i, i], matrix[:, i].sum()),
            "count": int(matrix[i].sum()),
        }
        for i, name in enumerate(names)
    }


def latency_summary(milliseconds: Iterable[float | None]) -> dict[str, float | int | None]:
    """Mean, 50 % and 90 % of latencies in ms, and how many there are; None (not reached) is left out.

    >>> latency_summary([100, 200, None, 300])
    {'mean': 200.0, 'p50': 200.0, 'p90': 280.0, 'count': 3}
    """
    reached = torch.tensor([value for value in milliseconds if value is not None], dtype=torch.float64)
    if not len(reached):
        return {"mean": None, "p50": None, "p90": None, "count": 0}
    middle, late = torch.quantile(reached, torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "mean": round(float(reached.mean()), 3),
        "p50": round(middle, 3),
        "p90": round(late, 3),
        "count": len(reached),
    }


def log_mel_distance(reference: Tensor, estimate: Tensor, sample_rate_hz: int) -> float:
    """Mean over frames of the root-mean-square log-mel difference of two waveforms (samples,), in dB.

    At 16 kHz, 80 bins; what lies 80 dB under the reference's loudest bin counts as silence on both sides; the longer
    one is cut. Not invariant to level. Raises InputError if a waveform is shorter than one 10 ms frame.
    """
    samples = min(reference.shape[-1], estimate.shape[-1])
    if samples < sample_rate_hz // 100 + 1:
        raise InputError(f"waveforms of {samples} samples are too short to compare: give at least 20 ms.")
    both = torch.stack([reference[..., :samples], estimate[..., :samples]]).detach().cpu().float()
    decibels = LogMel()(resample(both, sample_rate_hz, SAMPLE_RATE_HZ)) * DB_PER_NEPER_OF_POWER
    true, other = decibels.clamp_min(float(decibels[0].max()) - DYNAMIC_RANGE_DB)
    return float((true - other).square().mean(dim=-1).sqrt().mean())


# ---- the judge -------------------------------------------------------------------------------------------------------


class Judge:
    """A recogniser that this project did not train, asked whether speech can be understood.

    name       what figures call it
    own_error  its word error rate on original recordings, or None until `calibrate` was called
    """

    def __init__(self, name: str) -> None:
        self.name, self.own_error = name, None

    @staticmethod
    def best(name: str | None = None) -> "Judge":
        """faster-whisper with the model `name` or FREEZE_OMNI_JUDGE (hub name or folder), else pocketsphinx.

        Raises PartMissing if the wanted one, or every one, is not there: never a silent replacement.
        """
        name = name or os.environ.get("FREEZE_OMNI_JUDGE") or "pocketsphinx"
        return Sphinx() if name == "pocketsphinx" else Whisper(name)

    def transcribe(self, waveform: Tensor) -> str:
        """Waveform (samples,) at 16 kHz in [-1, 1] -> what was heard."""
        raise NotImplementedError

    def wer(self, waveforms: Sequence[Tensor], texts: Sequence[str]) -> float:
        """Word error rate of what the judge hears in these waveforms."""
        return wer(texts, [self.transcribe(waveform) for waveform in waveforms])

    def calibrate(self, originals: Sequence[Tensor], texts: Sequence[str]) -> float:
        """Measure and keep the judge's own error on original recordings of the texts."""
        self.own_error = self.wer(originals, texts)
        return self.own_error

    def require(self, limit: float = JUDGE_LIMIT) -> str:
        """Empty if this judge may decide, else the line to print in place of a figure.

        reason = judge.require()
        assert reason or judge.wer(speech, texts) < 0.1
        print(reason)
        """
        if self.own_error is None:
            return f"not measured: the judge {self.name} was not calibrated on the originals"
        if self.own_error > limit:
            return (
                f"not measured: the judge {self.name} gets {self.own_error:.1%} of the words wrong on the originals, "
                f"more than {limit:.1%}; set FREEZE_OMNI_JUDGE to a Whisper model"
            )
        return ""

    def facts(self) -> dict[str, Any]:
        """For a trace or a results file."""
        return {"name": self.name, "own_error": self.own_error}


class Sphinx(Judge):
    """pocketsphinx with the English model inside its wheel: always there, good for clean and simple speech only."""

    def __init__(self) -> None:
        super().__init__("pocketsphinx")
        if find_spec("pocketsphinx") is None:
            raise PartMissing(
                "no judge of intelligibility is installed: `pip install pocketsphinx` (extra `eval`)."
            )
        from pocketsphinx import Decoder

        # Batch normalisation sees one utterance at a time; the live kind carries the last one's level into the next.
        self.decoder = Decoder(samprate=SAMPLE_RATE_HZ, cmn="batch", loglevel="FATAL")

    def transcribe(self, waveform: Tensor) -> str:
        quiet = torch.zeros(SAMPLE_RATE_HZ // 4)  # words at the very edge are lost otherwise
        samples = torch.cat([quiet, waveform.detach().cpu().float(), quiet]).clamp(-1, 1) * 32767
        self.decoder.start_utt()
        self.decoder.process_raw(samples.to(torch.int16).numpy().tobytes(), full_utt=True)
        self.decoder.end_utt()
        heard = self.decoder.hyp()
        return heard.hypstr if heard else ""


class Whisper(Judge):
    """faster-whisper with a model from the hub or a local folder, greedy with beam 5, English."""

    def __init__(self, model: str) -> None:
        super().__init__(f"faster-whisper {Path(model).name}")
        if find_spec("faster_whisper") is None:
            raise PartMissing(
                f"judge {model!r} needs faster-whisper: `pip install faster-whisper` (extra `judge`)."
            )
        from faster_whisper import WhisperModel

        logging.getLogger("faster_whisper").setLevel(logging.ERROR)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model = WhisperModel(
                model, device=device, compute_type="default", cpu_threads=thread_count()
            )
        except (
            Exception
        ) as error:  # the hub client, the file system and ctranslate2 each have errors of their own
            what = f"judge {model!r} cannot be loaded ({type(error).__name__})"
            remedy = "give a folder with model.bin or a hub name that can be reached, or `pocketsphinx`"
            raise PartMissing(f"{what}: {remedy} in FREEZE_OMNI_JUDGE or --judge.") from error

    def transcribe(self, waveform: Tensor) -> str:
        samples = waveform.detach().cpu().float().numpy()
        pieces, _ = self.model.transcribe(
            samples, language="en", beam_size=5, condition_on_previous_text=False
        )
        return " ".join(piece.text.strip() for piece in pieces)


# ---- the judge of sound ----------------------------------------------------------------------------------------------


def dnsmos(waveforms: Sequence[Tensor]) -> float:
    """Mean DNSMOS P.835, overall, of waveforms (samples,) at 16 kHz: how listeners would rate them, from 1 to 5.

    As its authors measure: a clip is repeated until it fills 9.01 s, a longer one is rated in steps of a second. It
    judges noise and distortion, not words. Raises InputError for nothing to hear, PartMissing as `no_dnsmos` tells.
    """
    if not len(waveforms) or min(map(len, waveforms)) == 0:
        raise InputError("no sound to rate: give DNSMOS at least one waveform with at least one sample.")
    network = dnsmos_network()
    return sum(dnsmos_overall(network, waveform) for waveform in waveforms) / len(waveforms)


def no_dnsmos() -> str:
    """Empty if DNSMOS can be measured, else the line to print in place of a figure."""
    lacking = [name for name in ("speechmos", "onnxruntime") if find_spec(name) is None]
    if not lacking:
        return ""
    return f"not measured: DNSMOS needs {' and '.join(lacking)}; `pip install -e '.[judge]'`"


@functools.cache
def dnsmos_network() -> Any:
    """The network inside the package speechmos, whose own code would need librosa. Raises PartMissing."""
    if reason := no_dnsmos():
        raise PartMissing(f"{reason}.")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    place = Path(find_spec("speechmos").origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
    return onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])


def dnsmos_overall(network: Any, waveform: Tensor) -> float:
    """The overall score of one waveform (samples,) at 16 kHz, mean of its windows."""
    waveform = waveform.detach().cpu().float().clamp(-1, 1)
    while len(waveform) < DNSMOS_WINDOW_SAMPLES:
        waveform = waveform.repeat(2)
    windows = waveform.unfold(0, DNSMOS_WINDOW_SAMPLES, SAMPLE_RATE_HZ)
    name = network.get_inputs()[0].name
    raw = [float(network.run(None, {name: window[None].numpy()})[0][0][2]) for window in windows]
    squared, linear, constant = DNSMOS_OVERALL
    return sum(squared * x * x + linear * x + constant for x in raw) / len(raw)
