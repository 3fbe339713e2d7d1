"""The two proofs themselves: they pass for a causal stream and fail, with the place, for one that is not."""

import pytest
import torch
from torch import nn

from freeze_omni_lite import chunk
from freeze_omni_lite.chunk import StreamingConv1d


class Averages(nn.Module):
    """Mean of this and the next value, (batch, time) -> (batch, time, 1): looks ahead by one."""

    def forward(self, x):
        following = torch.cat([x[:, 1:], x[:, -1:]], dim=1)
        return ((x + following) / 2)[..., None]

    def start(self, batch=1):
        return {"held": torch.zeros(batch, 0)}

    def step(self, x, state):
        joined = torch.cat([state["held"], x], dim=1)
        state["held"] = joined[:, -1:]
        return ((joined[:, :-1] + joined[:, 1:]) / 2)[..., None]

    def finish(self, state):
        return state["held"][..., None]


class Forgetful(Averages):
    """The same, but each step starts anew: a stream that is wrong at every border."""

    def step(self, x, state):
        return self(x)

    def finish(self, state):
        return torch.zeros(len(state["held"]), 0, 1)


class Channels(nn.Module):
    """A StreamingConv1d over (batch, time, channels)."""

    def __init__(self, *sizes, **options):
        super().__init__()
        self.convolution = StreamingConv1d(*sizes, **options)

    def forward(self, x):
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)

    def start(self, batch=1):
        return self.convolution.start(batch)

    def step(self, x, state):
        return self.convolution.step(x.transpose(1, 2), state).transpose(1, 2)


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_look_ahead_is_flushed_by_finish(size):
    chunk.assert_streaming_equals_offline(Averages(), torch.randn(2, 20), size)


def test_proofs_name_the_place():
    x = torch.randn(1, 12)
    with pytest.raises(AssertionError, match="output 3 of 12"):
        chunk.assert_streaming_equals_offline(Forgetful(), x, 4)
    with pytest.raises(AssertionError, match="output 5 changed"):
        chunk.assert_past_never_changes(Averages(), x, cut=6, kept=6)
    chunk.assert_past_never_changes(Averages(), x, cut=6, kept=5)
    with pytest.raises(AssertionError, match="shapes differ"):
        chunk.first_difference(torch.zeros(1, 2), torch.zeros(1, 3), 0.1)


CONVOLUTIONS = [(5, 2, 1, 4), (15, 1, 6, 4), (3, 1, 1, 1), (1, 1, 1, 5), (4, 4, 1, 4)]


@pytest.mark.parametrize("kernel, stride, groups, size", CONVOLUTIONS)
def test_streaming_convolution(kernel, stride, groups, size):
    module, x = Channels(6, 6, kernel, stride=stride, groups=groups), torch.randn(2, 40, 6)
    assert module(x).shape == (2, 40 // stride, 6)
    chunk.assert_streaming_equals_offline(module, x, size, tolerance=1e-5)
    chunk.assert_past_never_changes(module, x, cut=20, kept=-(-20 // stride))


def test_fork_goes_its_own_way():
    module, x = Channels(2, 2, 5), torch.randn(1, 8, 2)
    state = module.start()
    module.step(x, state)
    twin = chunk.fork(state)
    first = module.step(x, state)
    module.step(-x, state)
    torch.testing.assert_close(module.step(x, twin), first)
