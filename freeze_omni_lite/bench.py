"""Speed and memory of the streams on this machine: what one 160 ms packet costs, variants measured in turn.

Behind `freeze-omni bench`. Speed does not depend on what weights have learned, so untrained ones are measured.
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, scales
from .adapter import Adapter
from .audio import CHUNK_MS, CHUNK_SAMPLES, MEL_FRAMES_PER_CHUNK, N_MELS, LogMel
from .encoder import Encoder
from .errors import InputError
from .ranks import device as pick_device
from .ranks import seed_all
from .threads import thread_count

LLM_WIDTH = {"paper": 3584}  # of Qwen2-7B-Instruct; SmolLM2 has 576
PACKETS = 80  # measured packets of each variant: beyond the 16 chunks of left context, so the cache is full
WARM_UP = 20


@dataclass
class Row:
    """One variant: median and 90th percentile of a packet, its share of real time, weights and state in MiB."""

    variant: str
    median_ms: float
    slow_ms: float
    real_time_factor: float
    weights_mib: float
    state_mib: float
    state_grew: bool


@dataclass
class Stream:
    """Something that eats one packet at a time. `nbytes` tells the size of its state."""

    variant: str
    packet: Callable[[], Any]
    nbytes: Callable[[], int]
    weights: int = 0


def features_stream() -> Stream:
    """Waveform packets to log-mels."""
    features, samples = LogMel(), 0.1 * torch.randn(1, CHUNK_SAMPLES)
    state = features.start()
    return Stream("features", lambda: features.step(samples, state), lambda: state.carry.nbytes)


def listening_stream(scale: str, dtype: torch.dtype = torch.float32) -> Stream:
    """Log-mel packets through the encoder and adapter of a scale, with weights in `dtype`."""
    encoder = Encoder.from_preset(scales.load("encoder_ctc", scale)).to(dtype).eval()
    preset = scales.load("encoder_adapter", scale)
    adapter = Adapter.from_preset(preset, encoder.width, LLM_WIDTH.get(scale, 576), 0.1).to(dtype).eval()
    mels = torch.randn(1, MEL_FRAMES_PER_CHUNK, N_MELS, dtype=dtype)
    state, adapter_state = encoder.start(), adapter.start()
    return Stream(
        f"encoder+adapter {scale} {str(dtype).removeprefix('torch.')}",
        lambda: adapter.step(encoder.step(mels, state), adapter_state),
        lambda: state.nbytes() + adapter_state["carry"].nbytes,
        weights_nbytes(encoder) + weights_nbytes(adapter),
    )


def weights_nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def streams() -> list[Stream]:
    """The variants that fit into any machine."""
    both = (torch.float32, torch.bfloat16)
    listening = [listening_stream(scale, dtype) for scale in ("laptop", "gpu") for dtype in both]
    return [features_stream(), listening_stream("tiny"), *listening]


def paper() -> list[Stream]:
    """The paper's encoder and adapter: 1.4 GB in single precision."""
    return [listening_stream("paper"), listening_stream("paper", torch.bfloat16)]


BENCHES: dict[str, Callable[[], list[Stream]]] = {"streams": streams, "paper": paper}


@torch.no_grad()
def measure(variants: list[Stream], packets: int = PACKETS, device: torch.device | None = None) -> list[Row]:
    """Feed all variants packet by packet in turn, so that a busy moment of the machine hits them all alike."""
    times: dict[str, list[float]] = {stream.variant: [] for stream in variants}
    sizes = {}
    for packet in range(WARM_UP + packets):
        for stream in variants:
            begin = time.perf_counter()
            stream.packet()
            wait_for(device)
            times[stream.variant].append(1000 * (time.perf_counter() - begin))
        if packet + 1 == WARM_UP:
            sizes = {stream.variant: stream.nbytes() for stream in variants}
    return [row(stream, times[stream.variant][WARM_UP:], sizes[stream.variant]) for stream in variants]


def wait_for(device: torch.device | None) -> None:
    """A GPU computes behind the clock's back; a packet is over when its frames are there."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()


def row(stream: Stream, milliseconds: list[float], nbytes_before: int) -> Row:
    median = statistics.median(milliseconds)
    return Row(
        variant=stream.variant,
        median_ms=round(median, 3),
        slow_ms=round(sorted(milliseconds)[int(0.9 * (len(milliseconds) - 1))], 3),
        real_time_factor=round(median / CHUNK_MS, 5),
        weights_mib=round(stream.weights / 2**20, 2),
        state_mib=round(stream.nbytes() / 2**20, 3),
        state_grew=stream.nbytes() > nbytes_before,
    )


def table(rows: list[Row]) -> str:
    """Aligned text, one line a variant."""
    head = f"{f'one {CHUNK_MS} ms packet':34}{'median ms':>10}{'90 % ms':>9}{'RTF':>9}{'weights':>12}{'state':>12}"
    lines = [
        f"{r.variant:34}{r.median_ms:10.2f}{r.slow_ms:9.2f}{r.real_time_factor:9.4f}"
        f"{r.weights_mib:8.1f} MiB{r.state_mib:8.3f} MiB{' growing' if r.state_grew else ''}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def conditions(what: Sequence[str], device: torch.device, seed: int) -> dict[str, Any]:
    """What a figure needs beside it: date, commit, command, machine, seed, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": " ".join(["freeze-omni bench", *what]),
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seed": seed,
        "threads": thread_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "freeze_omni_lite": __version__,
    }


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform


def main(
    what: str | Sequence[str] = (), output: Path | None = None, device: str | None = None, seed: int = 1
) -> int:
    """Measure the named benches ("streams" if none), print a table, write JSON to `output`. Returns 0.

    Raises InputError for an unknown bench or device.
    """
    what = [what] if isinstance(what, str) else list(what) or ["streams"]
    for name in what:
        if name not in BENCHES:
            close = get_close_matches(name, BENCHES, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"unknown bench {name!r}{hint}: use one of {', '.join(BENCHES)}.")
    on = pick_device(device)
    seed_all(seed)
    with (
        on
    ):  # streams make their weights and packets where torch makes new tensors; left before anything is timed
        variants = [stream for name in what for stream in BENCHES[name]()]
    rows = measure(variants, device=on)
    print(table(rows))
    if output is not None:
        Path(output).write_text(
            json.dumps(conditions(what, on, seed) | {"rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )
    return 0
