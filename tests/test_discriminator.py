"""The discriminators: sizes, lengths, losses by hand, who may move whom, that they learn, and bit-exact resume."""

import pytest
import torch
from torch import nn

from freeze_omni_lite import scales, training
from freeze_omni_lite.codec import Codec
from freeze_omni_lite.discriminator import (
    KINDS,
    Adversary,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from freeze_omni_lite.errors import InputError
from freeze_omni_lite.samples import generator_for


def preset(**changes) -> scales.Preset:
    """A codec that trains six steps, the last three of them against discriminators."""
    small = dict(width=16, steps=6, adversarial_start_step=3, batch_seconds=1.0, save_every=2, report_every=1)
    return scales.load("codec", "tiny", **small | changes)


def excerpts(step: int, rank: int = 0, world: int = 1) -> dict:
    """Noise whose loudness changes, as batches for training.fit; the second excerpt is shorter."""
    generator = generator_for(1, step * world + rank)
    waveforms = 0.1 * torch.randn(2, 12_000, generator=generator)
    waveforms = waveforms * torch.rand(2, 10, generator=generator).repeat_interleave(1200, dim=1)
    return {"waveforms": waveforms, "lengths": torch.tensor([12_000, 9000]), "seconds": 1.0, "step": step}


class Opposed(nn.Module):
    """The stage of notebook 01: a codec, and discriminators from `adversarial_start_step` on."""

    def __init__(self, preset: scales.Preset) -> None:
        super().__init__()
        self.codec, self.adversary, self.preset = (
            Codec.from_preset(preset),
            Adversary.from_preset(preset),
            preset,
        )

    def forward(self, batch: dict) -> dict:
        outputs = self.codec.reconstruct(batch["waveforms"], batch["lengths"])
        losses = self.codec.losses(outputs)
        if batch["step"] < self.preset.adversarial_start_step:
            return losses
        fooled, features, told_apart = self.adversary.losses(outputs["original"], outputs["rebuilt"])
        return losses | {
            "loss": losses["loss"] + 0.2 * fooled + 2 * features + told_apart,
            "told": told_apart.detach(),
        }


def build(preset: scales.Preset) -> Opposed:
    torch.manual_seed(1)
    return Opposed(preset)


def test_the_largest_have_the_released_sizes():
    """Numbers of released_model: its first scale discriminator has spectral norm, which needs no length a channel."""
    sizes = {kind: sum(p.numel() for p in Adversary(kind, 32).parameters()) for kind in KINDS}
    assert sizes["period"] == 41_105_770
    assert sizes["scale"] == 29_618_821 + 4097
    assert sizes["spectrogram"] < 1_000_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [600, 1000, 24_000])
def test_every_kind_scores_any_length(kind, samples):
    torch.manual_seed(1)
    found = Adversary(kind, 2)(0.1 * torch.randn(3, samples))
    assert len(found) == len(KINDS[kind][1])
    for layers in found:
        assert len(layers) >= 5 and layers[-1].shape[:2] == (3, 1)
        assert all(layer.isfinite().all() and layer.numel() for layer in layers)


def test_kinds_add_up_and_unknown_ones_are_refused():
    assert len(Adversary("spectrogram period scale", 2).discriminators) == 3 + 5 + 3
    for kinds in ("spectogram", "", "period wave"):
        with pytest.raises(
            InputError, match=r"^unknown discriminator .* use one or more of spectrogram, .*\.$"
        ):
            Adversary(kinds, 2)
    for scale in scales.SCALES:
        kinds = scales.load("codec", scale).discriminators.split()
        assert kinds and set(kinds) <= set(KINDS)


def test_losses_are_those_by_hand():
    real = [
        [torch.tensor([1.0, -2.0]), torch.tensor([0.9, 0.7])],
        [torch.tensor([10.0]), torch.tensor([1.0])],
    ]
    copy = [[torch.tensor([1.5, -1.0]), torch.tensor([0.2, 0.4])], [torch.tensor([8.0]), torch.tensor([0.0])]]
    first, second = ((0.01 + 0.09) / 2 + (0.04 + 0.16) / 2), 0.0
    assert discriminator_loss(real, copy).item() == pytest.approx((first + second) / 2)
    assert adversarial_loss(copy).item() == pytest.approx(((0.64 + 0.36) / 2 + 1) / 2)
    assert feature_loss(real, copy).item() == pytest.approx((1.5 / 3 + 2 / 10) / 2)
    assert feature_loss(real, real).item() == 0


def test_neither_side_moves_the_other():
    torch.manual_seed(1)
    adversary = Adversary("spectrogram period scale", 2)
    original, copy = 0.1 * torch.randn(2, 4000), (0.1 * torch.randn(2, 4000)).requires_grad_()
    weights = list(adversary.parameters())
    fooled, features, told_apart = adversary.losses(original, copy)
    for loss in (fooled, features):
        assert all(
            g is None for g in torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        )
        assert torch.autograd.grad(loss, copy, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(told_apart, copy, retain_graph=True, allow_unused=True)[0] is None
    gradients = torch.autograd.grad(told_apart, weights)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_codec_side_gradient_is_that_through_the_same_weights():
    torch.manual_seed(1)
    adversary = Adversary("spectrogram", 2)
    original, copy = 0.1 * torch.randn(1, 4000), (0.1 * torch.randn(1, 4000)).requires_grad_()
    fooled, features, _ = adversary.losses(original, copy)
    plain = adversarial_loss(adversary(copy)), feature_loss(adversary(original), adversary(copy))
    for mine, other in zip((fooled, features), plain, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(mine, copy, retain_graph=True),
            torch.autograd.grad(other, copy, retain_graph=True),
        )


def test_discriminators_learn_and_a_copy_learns_from_them():
    torch.manual_seed(1)
    adversary = Adversary("spectrogram", 4)
    time = torch.arange(6000) / 24_000
    original = 0.1 * torch.sin(2 * torch.pi * torch.tensor([[150.0], [220.0], [310.0], [470.0]]) * time)
    copy = nn.Parameter(0.05 * torch.randn(4, 6000))
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=3e-3)
    for _ in range(30):
        told_apart = adversary.losses(original, copy)[2]
        optimizer.zero_grad()
        told_apart.backward()
        optimizer.step()
    assert told_apart < 0.25, "noise and tones are easy to tell apart"
    before = sum(adversary.losses(original, copy)[:2])
    (slope,) = torch.autograd.grad(before, copy)
    moved = copy - 0.02 * slope.sign()
    assert sum(adversary.losses(original, moved)[:2]) < before


def test_they_join_at_their_step_and_resume_is_bit_exact(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZE_OMNI_DEVICE", "cpu")
    monkeypatch.setenv("FREEZE_OMNI_PRECISION", "no")
    whole = build(preset())
    history = training.fit(whole, excerpts, preset(), tmp_path / "whole")
    assert history.series("told")[0] == [4, 5, 6]  # reported after the step: the fourth is step 3
    fresh = build(preset()).state_dict()
    assert not torch.equal(
        whole.state_dict()["adversary.discriminators.0.layers.convolutions.0.bias"],
        fresh["adversary.discriminators.0.layers.convolutions.0.bias"],
    )

    for last_seen in (3, 5):  # interrupted before and after they joined

        def broken(step, rank, world, last_seen=last_seen):
            if step == last_seen:
                raise KeyboardInterrupt
            return excerpts(step, rank, world)

        folder = tmp_path / str(last_seen)
        with pytest.raises(KeyboardInterrupt):
            training.fit(build(preset()), broken, preset(), folder)
        halves = build(preset())
        resumed = training.fit(halves, excerpts, preset(), folder)
        assert all(
            torch.equal(value, halves.state_dict()[name]) for name, value in whole.state_dict().items()
        )
        assert [row["loss"] for row in resumed.rows] == [row["loss"] for row in history.rows]
