"""Waveforms and log-mel features, and every rate of the system, derived once.

Paper: "Chunk-wise Streaming Speech Encoder" (input) and "Codec Decoder" (output). Drawn in notebooks 00 and 02.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError
from .parts import ensure_torchaudio


def exact(numerator: int, denominator: int) -> int:
    """Integer division that refuses a remainder, so that no rate below is silently rounded."""
    quotient, remainder = divmod(numerator, denominator)
    if remainder:
        raise ValueError(f"{numerator} is not a multiple of {denominator}")
    return quotient


# Listening side: 16 kHz in, one log-mel frame every 10 ms.
SAMPLE_RATE_HZ = 16_000
N_MELS = 80
WINDOW_SAMPLES = exact(SAMPLE_RATE_HZ * 25, 1000)  # 400: each frame sees 25 ms
SHIFT_SAMPLES = exact(SAMPLE_RATE_HZ * 10, 1000)  # 160: frames start 10 ms apart
MEL_FRAMES_PER_SECOND = exact(SAMPLE_RATE_HZ, SHIFT_SAMPLES)  # 100
CARRY_SAMPLES = WINDOW_SAMPLES - SHIFT_SAMPLES  # 240: what one frame shares with the next

# The encoder keeps one frame in four, the adapter one in two of those.
ENCODER_DOWNSAMPLING = 4
ADAPTER_DOWNSAMPLING = 2
ENCODER_FRAMES_PER_SECOND = exact(MEL_FRAMES_PER_SECOND, ENCODER_DOWNSAMPLING)  # 25
LLM_VECTORS_PER_SECOND = ENCODER_FRAMES_PER_SECOND / ADAPTER_DOWNSAMPLING  # 12.5

# A chunk is the unit in which everything streams and in which the dialogue state is decided.
CHUNK_MS = 160
CHUNK_SAMPLES = exact(SAMPLE_RATE_HZ * CHUNK_MS, 1000)  # 2560
MEL_FRAMES_PER_CHUNK = exact(CHUNK_SAMPLES, SHIFT_SAMPLES)  # 16
ENCODER_FRAMES_PER_CHUNK = exact(MEL_FRAMES_PER_CHUNK, ENCODER_DOWNSAMPLING)  # 4
LLM_VECTORS_PER_CHUNK = exact(ENCODER_FRAMES_PER_CHUNK, ADAPTER_DOWNSAMPLING)  # 2

# Speaking side: 24 kHz out, one speech token every 25 ms.
SPEECH_SAMPLE_RATE_HZ = 24_000
HOP_SAMPLES = 600
SPEECH_TOKENS_PER_SECOND = exact(SPEECH_SAMPLE_RATE_HZ, HOP_SAMPLES)  # 40

N_FFT = 512  # the power of two above WINDOW_SAMPLES, as Kaldi pads
PREEMPHASIS = 0.97
LOG_FLOOR = torch.finfo(torch.float32).eps
INT16_SCALE = 32768.0  # Kaldi features are computed on 16-bit sample values


def load(path: str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Tensor:
    """Read any file that soundfile reads as mono float32 (samples,) at `sample_rate_hz`.

    Channels are averaged and other rates are resampled.
    Raises InputError if the file is missing, not audio, empty, or holds NaN or infinite samples.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no audio file at {path}: give the path of a wav, flac, ogg or mp3 file.")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be read as audio ({error}): give a wav, flac, ogg or mp3 file."
        ) from None
    if samples.shape[0] == 0:
        raise InputError(f"{path} holds no samples: give a recording of at least one chunk ({CHUNK_MS} ms).")
    if not np.isfinite(samples).all():
        raise InputError(
            f"{path} holds NaN or infinite samples: export it again with values between -1 and 1."
        )
    return resample(torch.from_numpy(samples.mean(axis=1)), rate, sample_rate_hz)


def save(path: str | Path, waveform: Tensor, sample_rate_hz: int) -> Path:
    """Write a mono waveform (samples,) as 16-bit audio, all or nothing; the suffix names the format.

    Raises InputError if the folder cannot be written or the suffix is no audio format.
    """
    import soundfile

    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix or '.wav'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = waveform.detach().cpu().float().clamp(-1, 1).numpy()
        soundfile.write(partial, data, sample_rate_hz, subtype="PCM_16")
        partial.replace(path)
    except (OSError, ValueError, TypeError, soundfile.LibsndfileError) as error:
        raise InputError(
            f"{path} cannot be written ({error}): choose a .wav or .flac path that you may write."
        ) from None
    finally:
        with suppress(OSError):  # a folder that cannot be written holds no partial file either
            partial.unlink()
    return path


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Band-limited resampling of (..., samples)."""
    if from_hz == to_hz:
        return waveform
    ensure_torchaudio()
    from torchaudio.functional import resample as convert

    return convert(waveform, from_hz, to_hz)


def pad_to_chunks(waveform: Tensor) -> Tensor:
    """Append zeros to (..., samples) until it is a whole, positive number of 160 ms chunks."""
    samples = waveform.shape[-1]
    whole = max(1, -(-samples // CHUNK_SAMPLES)) * CHUNK_SAMPLES
    return nn.functional.pad(waveform, (0, whole - samples))


def level_db(waveform: Tensor) -> float:
    """Root-mean-square level in decibels relative to full scale; silence gives -120."""
    return float(20 * torch.log10(waveform.float().square().mean().sqrt().clamp_min(1e-6)))


@dataclass
class LogMelState:
    """What a feature stream remembers: the last 240 samples (batch, samples)."""

    carry: Tensor


class LogMel(nn.Module):
    """Kaldi-style log-mel filter bank: 80 bins, 25 ms povey window, 10 ms shift, no dither.

    Equals torchaudio.compliance.kaldi.fbank and kaldi-native-fbank (tests), but works on a batch and on a stream.
    240 zeros stand before the first sample, so that every 2,560-sample chunk yields exactly 16 frames.
    """

    window: Tensor
    mel_weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        ensure_torchaudio()
        from torchaudio.compliance.kaldi import get_mel_banks

        banks, _ = get_mel_banks(N_MELS, N_FFT, SAMPLE_RATE_HZ, 20.0, 0.0, 100.0, -500.0, 1.0)
        self.register_buffer("mel_weights", nn.functional.pad(banks, (0, 1)).T.contiguous(), persistent=False)
        window = torch.hann_window(WINDOW_SAMPLES, periodic=False).pow(0.85)
        self.register_buffer("window", window, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) in [-1, 1] -> (batch, frames, mels), frames = samples // 160."""
        return self.frames(nn.functional.pad(waveform, (CARRY_SAMPLES, 0)))

    def start(self, batch: int = 1) -> LogMelState:
        return LogMelState(torch.zeros(batch, CARRY_SAMPLES, device=self.window.device))

    def step(self, samples: Tensor, state: LogMelState) -> Tensor:
        """(batch, samples), a multiple of 160 -> (batch, samples // 160, mels)."""
        joined = torch.cat([state.carry, samples], dim=-1)
        state.carry = joined[:, -CARRY_SAMPLES:]
        return self.frames(joined)

    def frames(self, samples: Tensor) -> Tensor:
        """(batch, samples) -> (batch, frames, mels) of every whole window in it."""
        frames = (samples * INT16_SCALE).unfold(-1, WINDOW_SAMPLES, SHIFT_SAMPLES)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        windowed = (frames - PREEMPHASIS * previous) * self.window
        power = torch.fft.rfft(windowed, n=N_FFT).abs().square()
        return (power @ self.mel_weights).clamp_min(LOG_FLOOR).log()
