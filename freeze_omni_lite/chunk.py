"""The streaming contract: state outside the module, and the two proofs that every stream must pass.

A streaming module has `start(batch) -> state`, `step(input, state) -> output` (updates the state in place) and,
where it looks ahead, `finish(state) -> output`. The module itself never changes, so one copy serves any number of
sessions. Proof 1: start + steps (+ finish) equals the offline `forward`. Proof 2: new input never alters old output.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def split(x: Tensor, size: int, dim: int = -1) -> Iterator[Tensor]:
    """Pieces of `size` along `dim`, in order; the last may be shorter."""
    yield from x.split(size, dim=dim)


def stream(module: nn.Module, x: Tensor, size: int, dim: int) -> Tensor:
    """Run `module` over x in pieces of `size` along `dim` and join the outputs along dim 1 (or the last, if 2-D)."""
    state = module.start(x.shape[0])
    outputs = [module.step(piece, state) for piece in split(x, size, dim)]
    if hasattr(module, "finish"):
        outputs.append(module.finish(state))
    return torch.cat(outputs, dim=1)


def fork(state: Any) -> Any:
    """An independent copy of a stream's state: what one side does next, the other does not see."""
    return copy.deepcopy(state)


def first_difference(a: Tensor, b: Tensor, tolerance: float, dim: int = 1) -> int | None:
    """Index along `dim` of the first place where a and b differ by more than `tolerance`, else None."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return None
    worst = (a - b).abs().movedim(dim, 0).flatten(1).amax(dim=1)
    places = (worst > tolerance).nonzero()
    return int(places[0]) if len(places) else None


@torch.no_grad()
def assert_streaming_equals_offline(
    module: nn.Module,
    x: Tensor,
    size: int,
    dim: int = 1,
    offline: Callable | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Proof 1. Raises AssertionError that names the first output index that differs."""
    whole = (offline or module)(x)
    place = first_difference(stream(module, x, size, dim), whole, tolerance)
    assert place is None, (
        f"streaming differs from offline at output {place} of {whole.shape[1]} (pieces of {size})"
    )


@torch.no_grad()
def assert_past_never_changes(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    cut: int,
    kept: int,
    dim: int = 1,
    tolerance: float = 1e-5,
) -> None:
    """Proof 2: changing x from index `cut` on leaves the first `kept` outputs (along dim 1) as they were."""
    changed = x.clone()
    changed.narrow(dim, cut, x.shape[dim] - cut).normal_()
    before, after = function(x), function(changed)
    assert kept <= before.shape[1], f"only {before.shape[1]} outputs, cannot compare {kept}"
    place = first_difference(before[:, :kept], after[:, :kept], tolerance)
    assert place is None, f"output {place} changed when input from {cut} on changed"


class StreamingConv1d(nn.Conv1d):
    """Causal convolution over (batch, channels, time): output j sees its own group of `stride` inputs and earlier ones.

    kernel - stride zeros stand before the first input, so the newest input of every output is the last of its group:
    nothing that has arrived waits for the next step. A step takes a multiple of `stride` inputs.
    """

    @property
    def left(self) -> int:
        """Inputs that an output sees before its own group."""
        return self.kernel_size[0] - self.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (self.left, 0)))

    def start(self, batch: int = 1) -> dict[str, Tensor]:
        return {"carry": self.weight.new_zeros(batch, self.in_channels, self.left)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        joined = torch.cat([state["carry"], x], dim=-1)
        state["carry"] = joined[..., joined.shape[-1] - self.left :]
        return super().forward(joined)
