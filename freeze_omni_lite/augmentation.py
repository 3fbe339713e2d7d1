"""Other rooms, microphones, noises and levels for clean speech, and SpecAugment for its features.

Everything draws from a torch.Generator that the caller seeds, keeps length and timing, needs no recordings.
Used by: samples.py, scenes.py, notebooks 02 to 04.
"""

import torch
from torch import Tensor

from . import audio
from .audio import MEL_FRAMES_PER_SECOND, SAMPLE_RATE_HZ

LEVELS_DB = (-35.0, -15.0)  # of a voice before the microphone, dB of full scale


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def augment(
    waveform: Tensor, generator: torch.Generator, snr_db: tuple[float, float] = (5.0, 30.0)
) -> Tensor:
    """Another room, microphone, noise and level for a waveform (samples,); same length, same timing.

    Each change happens in half of the calls; the same generator state gives the same result.
    snr_db   range of the level of speech over noise, dB
    """
    if uniform(0, 1, generator) < 0.5:
        waveform = add_room(waveform, generator)
    if uniform(0, 1, generator) < 0.5:
        waveform = tilt(waveform, uniform(-3.0, 3.0, generator))
    if uniform(0, 1, generator) < 0.5:
        kind = ("white", "pink", "hum", "chatter")[int(uniform(0, 4, generator))]
        waveform = add_noise(
            waveform, make_noise(kind, len(waveform), generator), uniform(*snr_db, generator)
        )
    return set_level(waveform, uniform(*LEVELS_DB, generator))


def set_level(waveform: Tensor, level_db: float) -> Tensor:
    """Scale to a root-mean-square level in dB of full scale, less if samples would leave [-1, 1]."""
    gain = 10 ** ((level_db - audio.level_db(waveform)) / 20)
    return waveform * min(gain, 0.99 / max(float(waveform.abs().max()), 1e-6))


def add_room(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """Convolve with a synthetic room: the direct sound, then noise that decays by 60 dB in 0.1 to 0.5 s."""
    decay_seconds, wet = uniform(0.1, 0.5, generator), uniform(0.1, 0.6, generator)
    seconds = torch.arange(int(decay_seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    echo = torch.randn(len(seconds), generator=generator) * torch.exp(-6.9 * seconds / decay_seconds)
    echo[: SAMPLE_RATE_HZ // 200] = 0.0  # nothing comes back within 5 ms
    echo = wet * echo / echo.norm().clamp_min(1e-6)
    size = fast_size(len(waveform) + len(echo))
    spectrum = torch.fft.rfft(waveform, size) * (1 + torch.fft.rfft(echo, size))
    return torch.fft.irfft(spectrum, size)[: len(waveform)]


def tilt(waveform: Tensor, db_per_octave: float) -> Tensor:
    """A microphone that favours low or high tones: unchanged at 1 kHz, at most 12 dB elsewhere."""
    size = fast_size(len(waveform))
    hz = torch.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ).clamp_min(20)
    gain_db = (db_per_octave * torch.log2(hz / 1000)).clamp(-12, 12)
    spectrum = torch.fft.rfft(waveform, size) * 10 ** (gain_db / 20)
    return torch.fft.irfft(spectrum, size)[: len(waveform)]


def fast_size(samples: int) -> int:
    """The power of two at or above: Fourier transforms of other lengths can take ten times as long."""
    return 1 << (samples - 1).bit_length()


def add_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Add noise (samples,) so that the waveform stands `snr_db` above it."""
    return waveform + noise * 10 ** ((audio.level_db(waveform) - audio.level_db(noise) - snr_db) / 20)


def make_noise(kind: str, samples: int, generator: torch.Generator) -> Tensor:
    """Noise (samples,): white, pink, hum (mains and overtones), chatter (waves of pink), music (chords)."""
    if kind == "white":
        return 0.1 * torch.randn(samples, generator=generator)
    if kind == "hum":
        hz = uniform(45, 65, generator)
        return 0.05 * sum(tone(hz * overtone, samples) / overtone for overtone in range(1, 7))
    if kind == "music":
        return chords(samples, generator)
    pink = tilt(0.1 * torch.randn(samples, generator=generator), -3.0)
    if kind == "pink":
        return pink
    if kind == "chatter":  # three bursts of syllables a second, as from a room next door
        wave = tone(uniform(2, 4, generator), samples, uniform(0, 6, generator))
        return pink * (0.2 + wave.clamp_min(0))
    raise ValueError(f"expected white, pink, hum, chatter or music, got {kind!r}")


def tone(hz: float, samples: int, phase: float = 0.0) -> Tensor:
    """A sine (samples,)."""
    return torch.sin(2 * torch.pi * hz / SAMPLE_RATE_HZ * torch.arange(samples) + phase)


def chords(samples: int, generator: torch.Generator) -> Tensor:
    """Music-like sound (samples,): a chord of three notes with overtones every 0.4 s."""
    length = int(0.4 * SAMPLE_RATE_HZ)
    seconds = torch.arange(length) / SAMPLE_RATE_HZ
    bars = []
    for _ in range(-(-samples // length)):
        root_hz = 130.8 * 2 ** (int(uniform(0, 24, generator)) / 12)
        notes = (
            root_hz * step * overtone for step in (1.0, 1.26, 1.5) for overtone in (1, 2, 3)
        )  # major chord
        bars.append(0.03 * sum(tone(hz, length) for hz in notes) * torch.exp(-4 * seconds))
    return torch.cat(bars)[:samples]


def spec_augment(
    mels: Tensor,
    mel_lengths: Tensor,
    generator: torch.Generator,
    bands: int = 2,
    band_mels: int = 8,
    gaps: int = 2,
    gap_seconds: float = 0.08,
) -> Tensor:
    """SpecAugment: replace random bands of mels and random stretches of time by the utterance's mean.

    mels         (batch, frames, mels) log-mel features
    mel_lengths  (batch,) frames that are not padding; no gap covers more than a tenth of them
    gap_seconds  at most; about a phone, for where the words cannot be guessed a hidden syllable teaches nothing
    """
    mels = mels.clone()
    for row, length in zip(mels, mel_lengths.tolist(), strict=True):
        mean = row[:length].mean()
        for _ in range(bands):
            width = int(uniform(0, band_mels + 1, generator))
            low = int(uniform(0, row.shape[1] - width, generator))
            row[:, low : low + width] = mean
        for _ in range(gaps):
            width = int(uniform(0, min(gap_seconds * MEL_FRAMES_PER_SECOND, length / 10), generator))
            begin = int(uniform(0, length - width, generator))
            row[begin : begin + width] = mean
    return mels
