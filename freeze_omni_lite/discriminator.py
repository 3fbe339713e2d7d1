"""Discriminators: small networks that learn to tell recordings from the codec's copies, for the codec to learn from.

Paper: "Codec Decoder" (decoder stage 1 trains with discriminators). A spectral loss compares loudness band by band;
where the tokens leave open what a sound was, the mean of all possibilities costs least, and a mean is dull. A
discriminator asks instead whether a copy could be a recording. Drawn in notebook 01; a trained codec needs none of it.

    spectrogram   2-D convolutions over log-magnitude spectra, windows of three sizes: cheap, enough on a laptop
    period        2-D convolutions over the waveform folded into rows of 2, 3, 5, 7 and 11 samples
    scale         1-D convolutions over the waveform at its full, half and quarter rate

The last two have the layout of HiFi-GAN, as in the released codec's configuration; the losses are its least squares.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from .codec import Spectrum
from .errors import InputError
from .scales import Preset

WINDOWS_SAMPLES = (512, 1024, 2048)
PERIODS_SAMPLES = (2, 3, 5, 7, 11)
RATES = (1, 2, 4)  # the waveform is averaged over so many samples
SLOPE = 0.1  # of the leaky rectifier
LOG_FLOOR = 1e-4  # of a full-scale tone, -80 dB: nobody hears it, so nobody should be told apart by it
LOG_MEAN, LOG_SPREAD = -6.5, 1.5  # of log magnitudes of speech: about zero mean and unit variance after them


class Layers(nn.Module):
    """Convolutions with leaky rectifiers between them, and a last one that scores every place."""

    def __init__(self, *convolutions: nn.Module) -> None:
        super().__init__()
        for convolution in convolutions[:-1]:  # features of unit size from the start: steps are few
            nn.init.kaiming_normal_(convolution.weight, SLOPE)
        self.convolutions = nn.ModuleList(weight_norm(convolution) for convolution in convolutions)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(batch, 1, ...) -> what every layer found (batch, channels, ...); the last are the scores."""
        *hidden, last = self.convolutions
        found = []
        for convolution in hidden:
            x = functional.leaky_relu(convolution(x), SLOPE)
            found.append(x)
        return [*found, last(x)]


class SpectrogramDiscriminator(nn.Module):
    """Scores patches of the log-magnitude spectrogram through one window size."""

    def __init__(self, window_samples: int, width: int) -> None:
        super().__init__()
        self.spectrum = Spectrum(window_samples, window_samples // 4)
        self.layers = Layers(
            nn.Conv2d(1, width, (3, 17), (2, 8), (1, 8)),  # frames, bands
            nn.Conv2d(width, width, (3, 9), (1, 2), (1, 4)),
            nn.Conv2d(width, width, (3, 9), (1, 2), (1, 4)),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.Conv2d(width, 1, 3, 1, 1),
        )

    def forward(self, waveform: Tensor) -> list[Tensor]:
        magnitude = self.spectrum(waveform)
        return self.layers((magnitude.clamp_min(LOG_FLOOR).log()[:, None] - LOG_MEAN) / LOG_SPREAD)


class PeriodDiscriminator(nn.Module):
    """Scores the waveform folded into rows of `period_samples`: convolutions run down the columns only."""

    def __init__(self, period_samples: int, width: int) -> None:
        super().__init__()
        self.period_samples = period_samples
        sizes = [1, width, 4 * width, 16 * width, 32 * width]
        strided = [nn.Conv2d(before, after, (5, 1), (3, 1), (2, 0)) for before, after in pairwise(sizes)]
        last = 32 * width
        self.layers = Layers(
            *strided, nn.Conv2d(last, last, (5, 1), 1, (2, 0)), nn.Conv2d(last, 1, (3, 1), 1, (1, 0))
        )

    def forward(self, waveform: Tensor) -> list[Tensor]:
        missing = -waveform.shape[-1] % self.period_samples
        rows = functional.pad(waveform, (0, missing)).unflatten(-1, (-1, self.period_samples))
        return self.layers(rows[:, None])


class ScaleDiscriminator(nn.Module):
    """Scores the waveform averaged over `rate` samples, with a long view per layer in few weights (groups)."""

    def __init__(self, rate: int, width: int) -> None:
        super().__init__()
        self.rate = rate
        sizes = [4 * width, 4 * width, 8 * width, 16 * width, 32 * width, 32 * width]
        strides, groups = (2, 2, 4, 4, 1), (4, 16, 16, 16, 16)
        grouped = [
            nn.Conv1d(before, after, 41, stride, 20, groups=min(group, before))
            for before, after, stride, group in zip(sizes, sizes[1:], strides, groups, strict=False)
        ]
        last = 32 * width
        self.layers = Layers(
            nn.Conv1d(1, 4 * width, 15, 1, 7),
            *grouped,
            nn.Conv1d(last, last, 5, 1, 2),
            nn.Conv1d(last, 1, 3, 1, 1),
        )

    def forward(self, waveform: Tensor) -> list[Tensor]:
        return self.layers(functional.avg_pool1d(waveform[:, None], self.rate))


KINDS = {
    "spectrogram": (SpectrogramDiscriminator, WINDOWS_SAMPLES),
    "period": (PeriodDiscriminator, PERIODS_SAMPLES),
    "scale": (ScaleDiscriminator, RATES),
}


class Adversary(nn.Module):
    """All discriminators of a preset, and the three losses between them and the codec.

    Its own weights are part of what trains, never of the codec that is kept: a trained system does not need them.
    """

    def __init__(self, kinds: str, width: int) -> None:
        """`kinds`: one or more of spectrogram, period, scale, blank-separated; `width`: channels of narrow layers.

        Raises InputError for a kind that is not there.
        """
        super().__init__()
        for kind in kinds.split() or [kinds]:
            if kind not in KINDS:
                raise InputError(
                    f"unknown discriminator {kind!r}: use one or more of {', '.join(KINDS)}, blank-separated."
                )
        chosen = [KINDS[kind] for kind in kinds.split()]
        self.discriminators = nn.ModuleList(kind(size, width) for kind, sizes in chosen for size in sizes)

    @classmethod
    def from_preset(cls, preset: Preset) -> "Adversary":
        """Fresh discriminators of a `codec` preset."""
        return cls(preset.discriminators, preset.discriminator_width)

    def forward(self, waveform: Tensor) -> list[list[Tensor]]:
        """24 kHz waveform (batch, samples) -> for each discriminator what its layers found, the scores last."""
        return [discriminator(waveform) for discriminator in self.discriminators]

    def losses(self, original: Tensor, copy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, samples) each -> the losses adversarial and features, for the codec, and discriminator, for this one.

        One backward pass trains both sides: the codec's losses see these weights as constants, the discriminators' own
        loss sees the copy as a recording of its own, without the codec behind it.
        """
        real, made = self(original), self(copy.detach())
        constants = {name: weight.detach() for name, weight in self.named_parameters()}
        judged = functional_call(self, constants, (copy,))
        return adversarial_loss(judged), feature_loss(real, judged), discriminator_loss(real, made)


def discriminator_loss(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    """Least squares: recordings should score 1, copies 0. Mean over discriminators; 0.5 if all score one half."""
    losses = [
        (1 - yes[-1].float()).square().mean() + no[-1].float().square().mean()
        for yes, no in zip(real, made, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(judged: list[list[Tensor]]) -> Tensor:
    """Least squares: copies should score 1. Mean over discriminators."""
    return torch.stack([(1 - found[-1].float()).square().mean() for found in judged]).mean()


def feature_loss(real: list[list[Tensor]], judged: list[list[Tensor]]) -> Tensor:
    """How far copies are from recordings inside the layers before the scores: mean |difference| over mean |recording|.

    Relative, so that no discriminator counts more because its numbers are larger. Mean over layers and discriminators.
    """
    distances = []
    for wanted, found in zip(real, judged, strict=True):
        for true, copied in zip(wanted[:-1], found[:-1], strict=True):
            true = true.detach().float()
            distances.append((copied.float() - true).abs().mean() / true.abs().mean().clamp_min(1e-5))
    return torch.stack(distances).mean()
