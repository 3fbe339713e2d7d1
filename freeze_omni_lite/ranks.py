"""Where a process computes, who it is among several, and the seeds that make runs repeat."""

import functools
import hashlib
import math
import os
import random
import time

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError

CLEARLY_FASTER = 1.3


def device(wanted: str | None = None) -> torch.device:
    """The device to use: `wanted`, else FREEZE_OMNI_DEVICE, else cuda, mps or cpu, the first that is there.

    Under torchrun every rank takes the GPU of its number. Raises InputError for a device that is not there.
    """
    wanted = wanted or os.environ.get("FREEZE_OMNI_DEVICE") or None
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = wanted or next(name for name, there in present.items() if there)
    if not present.get(kind.split(":")[0], False):
        there = ", ".join(name for name, is_there in present.items() if is_there)
        raise InputError(f"device {kind!r} is not available on this machine: use one of {there}.")
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device(kind)


def precision(on: torch.device) -> str:
    """The word bf16 where it pays, else no. FREEZE_OMNI_PRECISION overrides, for runs that must be repeatable.

    A GPU that supports bf16 uses it; on a CPU a short probe decides, because without matrix units bf16 is slower.
    """
    wanted = os.environ.get("FREEZE_OMNI_PRECISION", "")
    if wanted not in ("", "no", "bf16"):
        raise InputError(f"FREEZE_OMNI_PRECISION is {wanted!r}, expected no or bf16: change or unset it.")
    if wanted:
        return wanted
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if on.type == "cpu" and bf16_speedup_on_cpu() > CLEARLY_FASTER else "no"


@functools.cache
def bf16_speedup_on_cpu() -> float:
    """How many times faster bf16 is than float32 in forward + backward of two linear layers; takes under a second."""
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
        frames = torch.randn(256, 512)
    return probe_seconds(layers, frames, bf16=False) / probe_seconds(layers, frames, bf16=True)


def probe_seconds(layers: nn.Module, frames: Tensor, bf16: bool, budget_seconds: float = 0.25) -> float:
    """The shortest time of one forward + backward within the budget, in seconds; the first pass warms up."""
    best, spent, passes = math.inf, 0.0, 0
    while passes < 2 or spent < budget_seconds:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            layers(frames).float().square().mean().backward()
        seconds = time.perf_counter() - begin
        best, spent, passes = min(best, seconds if passes else math.inf), spent + seconds, passes + 1
    return best


def world() -> int:
    """How many ranks train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and prints: rank 0."""
    return rank() == 0


def say(line: str) -> None:
    """Print on rank 0."""
    if is_main():
        print(line, flush=True)


def start_ranks(on: torch.device | None = None):
    """The accelerate.Accelerator of this process; the first call under torchrun joins the ranks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    on = on or device()
    if on.type == "cuda" and on.index is not None:
        torch.cuda.set_device(on)  # accelerate takes the current one
    known = PartialState._shared_state.get("device")
    if known is not None and known.type != on.type and world() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one device per process
    # Stages have phases (a warm start, say) in which some trained parameters take no part in the loss.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Precision is left to autocast below: accelerate's own patches the stage's forward for good.
    return Accelerator(cpu=on.type == "cpu", mixed_precision="no", kwargs_handlers=[unused])


def barrier() -> None:
    """Wait until every rank is here; nothing to do for a single one."""
    if world() > 1:
        start_ranks().wait_for_everyone()


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and torch from a tuple of integers. Call it before building parts, so that runs repeat."""
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)
