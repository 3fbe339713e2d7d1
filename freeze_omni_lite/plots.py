"""Figures: every function draws static data on axes and returns them; nothing is shown, saved or kept.

One meaning per colour in all notebooks, each with a second mark (hatch, marker, line) for greyscale.
Time axes are in seconds. Data may be tensors, arrays or lists. `ax=None` makes a new figure; a figure of
several panels takes and returns an array of axes.
`python -m freeze_omni_lite.plots` writes the architecture figure of the README again.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .errors import InputError

USER, ASSISTANT, FROZEN, TRAINED, ERROR = "#1f5fa8", "#e36a00", "#d3e8f6", "#ffc53d", "#b3202a"
INK, QUIET, PAPER = "#222222", "#8a8a8a", "#ffffff"
TEAL, VIOLET = "#1d7f76", "#7b5aa6"  # with INK and QUIET: for what belongs to none of the five meanings above
STATE_NAMES = ("KEEP_LISTENING", "TAKE_TURN", "NO_RESPONSE")
LISTENING = "#a3bfe0"  # a tint of the user's blue, so that marks stay visible on it
STATE_LOOK = ((LISTENING, ""), (ASSISTANT, "//"), (QUIET, "xx"))  # colour and hatch of states 0, 1, 2
LINES = (  # colour, line and marker of the first, second, ... curve of a figure
    (INK, "-", "o"),
    (TEAL, "--", "s"),
    (VIOLET, ":", "^"),
    (QUIET, "-.", "x"),
    (INK, ":", "d"),
)
# colour and hatch of grouped bars
BARS = ((TEAL, ""), (VIOLET, "//"), (QUIET, ".."), (PAPER, "xx"), (INK, ""))
CHUNK_SECONDS = 0.16
SVG_PATH = Path(__file__).resolve().parents[1] / "data_samples" / "figures" / "architecture.svg"


def style() -> None:
    """The look of all figures: the one global setting, called at the top of a notebook."""
    plt.rcParams.update(
        {
            "figure.figsize": (10, 3),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "legend.frameon": False,
            "hatch.linewidth": 0.6,
            "hatch.color": INK,
            "image.interpolation": "nearest",
            "svg.fonttype": "none",
            "svg.hashsalt": "freeze_omni_lite",
        }
    )


# --- small helpers --------------------------------------------------------------------------------


def numbers(data: Any) -> np.ndarray:
    """Any tensor, array or list as a float or integer array on the CPU."""
    if hasattr(data, "detach"):
        data = data.detach().cpu()
        data = data.float() if data.is_floating_point() else data
    return np.asarray(data)


def new_axes(ax: Axes | None, size: tuple[float, float] = (10, 3)) -> Axes:
    return ax if ax is not None else plt.figure(figsize=size, layout="constrained").add_subplot()


def panels(
    ax: Sequence[Axes] | None, heights: Sequence[float], size: tuple[float, float], shared: bool = True
) -> Any:
    """Axes above one another on one time axis, or the ones given."""
    if ax is not None:
        return np.asarray(ax)
    figure = plt.figure(figsize=size, layout="constrained")
    return figure.subplots(len(heights), 1, sharex=shared, height_ratios=heights)


def heading(ax: Axes, title: str) -> Axes:
    ax.set_title(title, loc="left", fontsize=11)
    return ax


def draw_waveform(ax: Axes, clip: Any, sample_rate_hz: int, colour: str, start_seconds: float = 0.0) -> None:
    """Least and greatest sample of each of up to 1500 slices: small files, no lost peaks."""
    clip = numbers(clip).reshape(-1)
    slices = np.array_split(clip, min(1500, max(1, clip.size)))
    seconds = start_seconds + np.arange(len(slices)) * clip.size / len(slices) / sample_rate_hz
    low, high = ([f(part) if part.size else 0.0 for part in slices] for f in (np.min, np.max))
    ax.fill_between(seconds, low, high, color=colour, linewidth=0.4, step="mid")
    ax.set_ylim(-1.05 * peak(clip), 1.05 * peak(clip))
    ax.set_ylabel("amplitude")


def peak(clip: np.ndarray) -> float:
    return max(float(np.abs(clip).max(initial=0.0)), 1e-3)


def draw_marks(ax: Axes, marks: Mapping[str, float] | None, labelled: bool = True) -> int:
    """Vertical lines at times in ms; names stand above the axes, each a line higher if the last one is near.

    Returns the number of lines of names.
    """
    row, rows, last, span = 0, 0, -np.inf, np.subtract(*ax.get_xlim()[::-1])
    for name, at_ms in sorted((marks or {}).items(), key=lambda mark: mark[1]):
        at = at_ms / 1000
        row, last = (row + 1 if at - last < 0.16 * span else 0), at
        rows = max(rows, row + 1)
        ax.axvline(at, color=INK, linewidth=1, linestyle="--")
        if labelled:
            place = dict(
                xycoords=("data", "axes fraction"), xytext=(2, 2 + 11 * row), textcoords="offset points"
            )
            ax.annotate(name.replace("_", " "), (at, 1), fontsize=8, color=INK, **place)
    return rows


# --- the map of the paper -------------------------------------------------------------------------

# name: left, bottom, width, height, text
BOXES: dict[str, tuple[float, float, float, float, str]] = {
    "encoder": (4.2, 0.55, 2.0, 1.0, "speech encoder\n(chunk-wise)"),
    "adapter": (7.4, 0.55, 1.6, 1.0, "adapter"),
    "prompt_embedding": (11.1, 0.55, 2.0, 1.0, "prompt\nembedding"),
    "llm": (4.2, 2.75, 8.9, 0.95, "LLM (text model, never trained)"),
    "state_head": (1.65, 2.75, 1.45, 0.95, "state head"),
    "prefix_decoder": (2.65, 4.95, 2.0, 1.05, "NAR prefix\nspeech decoder"),
    "nar": (5.9, 4.95, 1.5, 1.05, "NAR\n(prefill)"),
    "ar": (8.25, 4.95, 1.5, 1.05, "AR\n(steps)"),
    "codec": (11.75, 4.95, 1.95, 1.05, "streaming\ncodec decoder"),
}
PARTS_OF = {"speech_decoder": ("nar", "ar")}
ARROWS = (  # from x, y; to x, y; label; where the label stands
    (1.35, 1.05, 2.05, 1.05, "16 kHz", "above"),
    (3.2, 1.05, 4.2, 1.05, "100 Hz\n80 mels", "both"),
    (6.2, 1.05, 7.4, 1.05, "25 Hz\n4 a chunk", "both"),
    (8.2, 1.55, 8.2, 2.75, "12.5 Hz: 2 vectors\na chunk of 160 ms", "right"),
    (12.1, 1.55, 12.1, 2.75, "25 vectors, before\nevery question", "left"),
    (4.2, 3.22, 3.1, 3.22, "last vector\nof a chunk", "both"),
    (1.65, 3.22, 1.15, 3.22, "", "above"),
    (4.4, 3.7, 4.4, 4.95, "hidden states", "left"),
    (6.6, 3.7, 6.6, 4.95, "text tokens, one\nsegment at a time", "right"),
    (4.65, 5.47, 5.72, 5.47, "kv_cache\n(prefix)", "both"),
    (7.4, 5.47, 8.25, 5.47, "kv_cache", "above"),
    (9.92, 5.47, 10.6, 5.47, "40 Hz", "above"),
    (11.5, 5.47, 11.75, 5.47, "", "above"),
    (13.7, 5.47, 14.0, 5.47, "", "above"),
)


def architecture(
    train: str | Iterable[str] = (),
    frozen: str | Iterable[str] = ("llm",),
    captions: Mapping[str, str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The system of the paper's overview figure, drawn anew, with the boxes that are trained here lit.

    train     box name or names: codec, encoder, adapter, llm, prompt_embedding, state_head, prefix_decoder,
              speech_decoder (or its halves nar, ar)
    frozen    boxes that run but do not change
    captions  box name -> one short line under the box's name, for example a shape or a parameter count
    Raises InputError for an unknown box.
    """
    trained, cold = box_names(train), box_names(frozen)
    ax = new_axes(ax, (10, 5.0))
    ax.set(xlim=(-0.15, 15.5), ylim=(-0.25, 7.0), aspect="equal")
    ax.axis("off")
    lines = {part: line for name, line in (captions or {}).items() for part in box_names(name)[:1]}
    draw_shared_stack(ax)
    for name in BOXES:
        draw_box(ax, name, name in trained, name in cold, lines.get(name, ""))
    draw_ends(ax)
    for arrow in ARROWS:
        draw_arrow(ax, *arrow)
    looks = (("trained here", TRAINED, "//"), ("frozen", FROZEN, "--"), ("not in use here", PAPER, ""))
    keys = [
        Patch(facecolor=c, hatch=h, edgecolor=INK, label=n) for n, c, h in (looks if trained else looks[1:2])
    ]
    ax.legend(
        handles=keys, loc="upper left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=8.5, handlelength=1.6
    )
    lit = ", ".join(name.replace("_", " ") for name in ([train] if isinstance(train, str) else train))
    return heading(
        ax, title or (f"Trained here: {lit}" if lit else "Freeze-Omni: speech in and out of a frozen LLM")
    )


def box_names(names: str | Iterable[str]) -> list[str]:
    """Names of drawn boxes; speech_decoder stands for nar and ar. Raises InputError for an unknown one."""
    known = [*BOXES, *PARTS_OF]
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"the figure has no box {name!r}{hint}: use one of {', '.join(known)}.")
    return [part for name in names for part in PARTS_OF.get(name, (name,))]


def draw_box(ax: Axes, name: str, trained: bool, cold: bool, line: str) -> None:
    left, bottom, width, height, text = BOXES[name]
    colour, hatch = (TRAINED, "//") if trained else (FROZEN, "--") if cold else (PAPER, "")
    shape = dict(boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=INK, zorder=2)
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, linewidth=2.4 if trained else 1, **shape))
    if hatch:  # a band at the left edge, so that no text stands on a hatch
        band = Rectangle((left + 0.06, bottom + 0.08), 0.16, height - 0.16, facecolor="none", zorder=3)
        band.set(hatch=hatch * 2, edgecolor=INK, linewidth=0)
        ax.add_patch(band)
    middle = (left + width / 2 + (0.08 if hatch else 0), bottom + height / 2)
    words = f"{text}\n{line}" if line else text
    ax.text(*middle, words, ha="center", va="center", fontsize=8.5, zorder=4, linespacing=1.15)


def draw_shared_stack(ax: Axes) -> None:
    """The frame around NAR and AR: one stack of weights, used twice."""
    frame = dict(
        boxstyle="round,pad=0,rounding_size=0.12", facecolor="#f4f4f4", edgecolor=QUIET, linestyle="--"
    )
    ax.add_patch(FancyBboxPatch((5.72, 4.78), 4.2, 1.72, zorder=1, **frame))
    ax.text(
        7.82, 6.24, "speech decoder: one stack, two uses", ha="center", va="center", fontsize=8, color=INK
    )


def draw_ends(ax: Axes) -> None:
    """What is data and not a part: waveforms, mel, states, the FIFO of speech tokens."""
    draw_icon_wave(ax, 0.0, 1.05, USER, "user's speech")
    stripes = (
        np.add.outer(np.sin(np.linspace(0, 5, 12)), np.cos(np.linspace(0, 9, 16)))
        + np.linspace(0, 2, 12)[:, None]
    )
    ax.imshow(stripes, extent=(2.05, 3.2, 0.6, 1.5), cmap="Greys", aspect="auto", zorder=2)
    ax.text(2.62, 0.3, "log-mel", ha="center", va="center", fontsize=8.5)
    ax.text(1.1, 3.22, "0 keep listening\n1 take turn\n2 no response", ha="right", va="center", fontsize=8)
    for cell in range(3):
        ax.add_patch(Rectangle((10.6 + 0.3 * cell, 5.2), 0.3, 0.55, facecolor=PAPER, edgecolor=INK, zorder=2))
    ax.text(11.05, 4.9, "speech-token\nFIFO", ha="center", va="top", fontsize=8)
    draw_icon_wave(ax, 14.05, 5.47, ASSISTANT, "answer, 24 kHz")
    ax.set(xlim=(-0.15, 15.5), ylim=(-0.25, 7.0), aspect="equal")  # imshow moves the limits


def draw_icon_wave(ax: Axes, left: float, middle: float, colour: str, name: str) -> None:
    x = np.linspace(0, 1, 160)
    ax.plot(
        left + 1.3 * x, middle + 0.4 * np.sin(70 * x) * np.sin(np.pi * x) * np.cos(5 * x), color=colour, lw=1
    )
    ax.text(
        left + 0.65, middle - 0.75, name, ha="center", va="center", fontsize=8.5, color=colour, weight="bold"
    )


def draw_arrow(ax: Axes, x0: float, y0: float, x1: float, y1: float, label: str, side: str) -> None:
    """An arrow with its rate; "both" writes the first line above and the second below a level arrow."""
    ax.annotate(
        "", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="-|>", color=INK, lw=1.2, shrinkA=0, shrinkB=0)
    )
    x, y, text = (x0 + x1) / 2, (y0 + y1) / 2, dict(fontsize=7.5, color=INK, zorder=5)
    if side in ("left", "right"):
        step = 0.12 if side == "right" else -0.12
        ax.text(x + step, y, label, ha="left" if side == "right" else "right", va="center", **text)
        return
    above, below = (label.split("\n") + [""])[:2] if side == "both" else (label, "")
    ax.text(x, y + 0.12, above, ha="center", va="bottom", **text)
    ax.text(x, y - 0.14, below, ha="center", va="top", **text)


# --- sound ----------------------------------------------------------------------------------------


def waveform_and_mel(
    clip: Any,
    sample_rate_hz: int = 16_000,
    mels: Any = None,
    chunks: bool = False,
    speaker: str = "user",
    title: str = "",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """A waveform (samples,) over its log-mel features on one time axis; `chunks` draws the 160 ms borders.

    mels      (frames, mels) at 100 Hz; computed from the clip if not given
    speaker   user or assistant, which sets the colour
    """
    clip = numbers(clip).reshape(-1)
    mels = numbers(mels) if mels is not None else log_mel(clip, sample_rate_hz)
    ax = panels(ax, (1, 1.6), (10, 3.6))
    draw_waveform(ax[0], clip, sample_rate_hz, USER if speaker == "user" else ASSISTANT)
    image = ax[1].imshow(
        mels.T, origin="lower", aspect="auto", cmap="magma", extent=(0, len(mels) / 100, 0, mels.shape[1])
    )
    ax[1].figure.colorbar(image, ax=ax[1], label="log energy", pad=0.01)
    ax[1].set(xlabel="time (s)", ylabel="mel band", xlim=(0, clip.size / sample_rate_hz))
    if chunks:
        for axis, colour in zip(ax, (QUIET, PAPER), strict=True):
            for border in np.arange(CHUNK_SECONDS, clip.size / sample_rate_hz, CHUNK_SECONDS):
                axis.axvline(border, color=colour, linewidth=0.5)
    heading(ax[0], title or f"{clip.size / sample_rate_hz:.2f} s of speech are {len(mels)} mel frames")
    return ax


def log_mel(clip: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """(frames, mels) as the encoder sees them, 100 frames a second."""
    import torch

    from .audio import SAMPLE_RATE_HZ, LogMel, resample

    waveform = resample(torch.as_tensor(clip, dtype=torch.float32), sample_rate_hz, SAMPLE_RATE_HZ)
    return numbers(LogMel()(waveform[None])[0])


def spectrogram_pair(
    before: Any,
    after: Any,
    sample_rate_hz: int = 24_000,
    names: tuple[str, str] = ("original", "after the codec"),
    title: str = "",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Two waveforms as spectrograms of one colour scale, so that what was lost is visible."""
    ax = panels(ax, (1, 1), (10, 4.4))
    for axis, clip, name in zip(ax, (before, after), names, strict=True):
        decibels = spectrogram_db(numbers(clip).reshape(-1), sample_rate_hz)
        extent = (0, numbers(clip).size / sample_rate_hz, 0, sample_rate_hz / 2000)
        image = axis.imshow(
            decibels, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0, extent=extent
        )
        axis.set(ylabel="frequency (kHz)")
        axis.text(0.01, 0.93, name, transform=axis.transAxes, color=PAPER, va="top", weight="bold")
    ax[-1].set_xlabel("time (s)")
    ax[0].figure.colorbar(image, ax=list(ax), label="level (dB below the loudest)", pad=0.01)
    heading(ax[0], title or f"{names[0]} and {names[1]}")
    return ax


def spectrogram_db(clip: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """(frequencies, frames) in dB below the loudest point; windows of about 25 ms every 10 ms."""
    window, hop = round(0.025 * sample_rate_hz), round(0.010 * sample_rate_hz)
    clip = np.pad(clip, (0, max(0, window - clip.size)))
    frames = np.lib.stride_tricks.sliding_window_view(clip, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
    return 10 * np.log10(np.maximum(power / max(power.max(), 1e-12), 1e-8))


def tokens_over_time(codes: Any, per_second: float = 40, title: str = "", ax: Axes | None = None) -> Axes:
    """Speech tokens (tokens,) as steps over time."""
    codes, ax = numbers(codes).reshape(-1), new_axes(ax, (10, 2.4))
    seconds = np.arange(codes.size + 1) / per_second
    ax.stairs(codes, seconds, color=ASSISTANT, baseline=None, linewidth=1)
    ax.plot(seconds[:-1] + 0.5 / per_second, codes, ".", color=INK, markersize=3)
    ax.set(xlabel="time (s)", ylabel="code", xlim=(0, seconds[-1]))
    return heading(ax, title or f"{codes.size} speech tokens, {len(set(codes.tolist()))} different codes")


# --- training -------------------------------------------------------------------------------------


def loss_curve(
    history: Iterable[Mapping[str, Any]],
    keys: str | Sequence[str] = "loss",
    title: str = "",
    unit: str = "nats",
    ax: Axes | None = None,
) -> Axes:
    """Values of rows like {"step": 5, "loss": 2.1}; rows without a key are left out of its curve."""
    rows, keys = list(history), [keys] if isinstance(keys, str) else list(keys)
    series = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys}
    found = next(([y for _, y in points] for points in series.values() if points), [])
    fell = (
        f"{keys[0]}: {found[0]:.3g} at first, {found[-1]:.3g} at the end" if found else "nothing was recorded"
    )
    return learning_curves(series, x_label="step", y_label=f"loss ({unit})", title=title or fell, ax=ax)


def learning_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str = "step",
    y_label: str = "error rate (%)",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Several named curves of (x, y) points, told apart by colour, line and marker."""
    ax = new_axes(ax)
    for index, (name, points) in enumerate(series.items()):
        colour, line, marker = LINES[index % len(LINES)]
        x, y = zip(*points, strict=True) if len(points) else ((), ())
        ax.plot(
            x, y, line, color=colour, marker=marker, markevery=max(1, len(x) // 12), markersize=4, label=name
        )
    if len(series) > 1:
        ax.legend()
    ax.set(xlabel=x_label, ylabel=y_label)
    whole = all(isinstance(x, int) for points in series.values() for x, _ in points)
    ax.xaxis.set_major_locator(MaxNLocator(integer=whole))
    return heading(ax, title)


def error_bars(
    rates: Mapping[str, float | Mapping[str, float]],
    y_label: str = "error rate (%)",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Bars with their values: {"chunk 4": 12.1} or {"test": {"CTC": 12.1, "LLM": 9.0}}."""
    ax = new_axes(ax, (10, 2.8))
    groups = {k: v if isinstance(v, Mapping) else {"": v} for k, v in rates.items()}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        at = np.arange(len(groups)) + (index - (len(names) - 1) / 2) * width
        colour, hatch = BARS[index % len(BARS)]
        values = [group.get(name, np.nan) for group in groups.values()]
        bars = ax.bar(
            at, values, 0.94 * width, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.5, label=name
        )
        ax.bar_label(bars, [f"{v:.3g}" if v == v else "" for v in values], padding=2, fontsize=9)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set(ylabel=y_label, xlim=(-0.6, len(groups) - 0.4))
    ax.margins(y=0.15)
    if not any(v > 0 for group in groups.values() for v in group.values()):
        ax.set_ylim(0, 1)
    if names != [""]:
        ax.legend(ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1))
    return heading(ax, title)


# --- inside the models ----------------------------------------------------------------------------


def mask(
    allowed: Any,
    chunk_frames: int | None = None,
    names: tuple[str, str] = ("frame that looks", "frame that is seen"),
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A bool attention mask (queries, keys), dark where attention is allowed, lines at chunk borders."""
    allowed, ax = numbers(allowed).astype(bool), new_axes(ax, (5, 4.2))
    ax.imshow(allowed, cmap=ListedColormap([PAPER, TEAL]), vmin=0, vmax=1)
    rows, columns = allowed.shape
    for border in range(chunk_frames or 0, max(rows, columns), chunk_frames or 1) if chunk_frames else ():
        for draw, size in ((ax.axhline, rows), (ax.axvline, columns)):
            if border < size:
                draw(border - 0.5, color=INK, linewidth=1)
    ax.set(ylabel=names[0], xlabel=names[1])
    ax.spines[["top", "right"]].set_visible(True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return heading(ax, title or f"{allowed.mean():.0%} of all pairs may attend")


def ctc_trellis(
    log_probs: Any,
    alignment: Sequence[int] | None = None,
    units: Sequence[str] | None = None,
    frame_ms: float = 40,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Unit probabilities over time with the path through them.

    log_probs  (frames, units); only units that the path uses, or that reach 10 % somewhere, get a row
    alignment  one unit a frame; the likeliest unit of every frame if not given
    units      a name for every unit
    """
    probabilities, ax = np.exp(numbers(log_probs)), new_axes(ax, (10, 3.4))
    path = [int(u) for u in (alignment if alignment is not None else probabilities.argmax(1))]
    loud = np.flatnonzero(probabilities.max(0) >= 0.1).tolist()
    rows = list(dict.fromkeys([*path, *loud])) if len(loud) <= 30 else list(dict.fromkeys(path))
    seconds = frame_ms / 1000
    extent = (0, len(path) * seconds, len(rows) - 0.5, -0.5)
    image = ax.imshow(probabilities[:, rows].T, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent)
    x, y = (np.arange(len(path)) + 0.5) * seconds, [rows.index(unit) for unit in path]
    ax.plot(x, y, "o-", color=ASSISTANT, markersize=4, markeredgecolor=INK, markeredgewidth=0.5, linewidth=1)
    ax.set_yticks(range(len(rows)), [str(units[r]) if units is not None else str(r) for r in rows])
    ax.set(xlabel="time (s)", ylabel="unit")
    ax.figure.colorbar(image, ax=ax, label="probability", pad=0.01)
    return heading(ax, title or f"{len(path)} frames through {len(rows)} units")


def codebook_usage(
    counts: Any, perplexity: float | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """How often each code (codes,) was used, most used first, against equal use; shares on a logarithmic scale."""
    counts, ax = np.sort(numbers(counts).astype(float).reshape(-1))[::-1], new_axes(ax, (10, 2.6))
    share = counts / max(counts.sum(), 1)
    if perplexity is None:
        perplexity = float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
    floor = 30 * min(1 / counts.size, *share[share > 0])  # below the rarest code; unused ones stay empty
    ax.stairs(100 * share, np.arange(counts.size + 1), baseline=floor, fill=True, color=ASSISTANT)
    ax.axhline(100 / counts.size, color=INK, linestyle="--", linewidth=1, label="equal use")
    ax.axvline(perplexity, color=USER, linestyle=":", linewidth=1.5, label=f"perplexity {perplexity:.0f}")
    ax.set(xlabel="codes, most used first", ylabel="share of tokens (%)", xlim=(0, counts.size), yscale="log")
    ax.set_ylim(floor, None)
    ax.legend()
    return heading(
        ax, title or f"{(counts > 0).sum()} of {counts.size} codes in use, perplexity {perplexity:.0f}"
    )


def directions(latents: Any, codes: Any, vectors: Any, title: str = "", ax: Axes | None = None) -> Axes:
    """Latents (count, 2) with the code of each (count,), and the code vectors (codes, 2), on the unit circle."""
    latents, codes, vectors, ax = numbers(latents), numbers(codes), numbers(vectors), new_axes(ax, (4.4, 4.2))
    latents = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=QUIET, linewidth=0.7)
    for (x, y), code in zip(latents, codes, strict=True):
        ax.plot([x, vectors[code, 0]], [y, vectors[code, 1]], ":", color=INK, linewidth=1)
    ax.plot(*latents.T, "o", color=USER, label="latents")
    ax.plot(*vectors.T, "*", color=ASSISTANT, markersize=14, markeredgecolor=INK, label="codes")
    for code, (x, y) in enumerate(vectors):
        ax.annotate(str(code), (1.16 * x, 1.16 * y), ha="center", va="center")
    ax.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xlabel="first number", ylabel="second number")
    ax.legend(loc="center")
    return heading(ax, title or f"{len(set(codes.tolist()))} of {len(vectors)} codes in use")


def confusion(
    matrix: Any, labels: Sequence[str] = STATE_NAMES, title: str = "", ax: Axes | None = None
) -> Axes:
    """Counts (true, predicted), shaded by the share of each true class."""
    matrix, ax = numbers(matrix).astype(float), new_axes(ax, (5.4, 3.8))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Greys", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        colour = PAPER if share[row, column] > 0.55 else INK
        ax.text(column, row, f"{count:.0f}\n{share[row, column]:.0%}", ha="center", va="center", color=colour)
    names = [name.replace("_", "\n") for name in labels]
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xlabel="predicted", ylabel="true")
    right = np.trace(matrix) / max(matrix.sum(), 1)
    return heading(ax, title or f"{right:.0%} of {matrix.sum():.0f} chunks right")


# --- dialogue -------------------------------------------------------------------------------------


def gate(
    waveform: Any,
    speech: Sequence[bool],
    look_back_chunks: int,
    sample_rate_hz: int = 16_000,
    title: str = "",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """A waveform over what the acoustic gate said of every chunk; the stretch replayed at the opening is shaded."""
    ax = panels(ax, (1.2, 0.35), (10, 2.6))
    draw_waveform(ax[0], waveform, sample_rate_hz, USER)
    for index, heard in enumerate(speech):
        box = Rectangle(
            (index * CHUNK_SECONDS, 0), CHUNK_SECONDS, 1, facecolor=TEAL if heard else PAPER, edgecolor=QUIET
        )
        ax[1].add_patch(box)
    ax[1].set(ylim=(0, 1), yticks=[], ylabel="gate", xlabel="time (s)")
    ax[1].set_xlim(0, len(speech) * CHUNK_SECONDS)
    finding = "No chunk holds speech, the gate stays shut"
    if any(speech):
        first = list(speech).index(True)
        begin, end = max(0, first - look_back_chunks) * CHUNK_SECONDS, first * CHUNK_SECONDS
        ax[0].axvspan(begin, end, facecolor=FROZEN, hatch="//", edgecolor=QUIET, linewidth=0.5, zorder=0)
        draw_marks(ax[0], {"gate opens": 1000 * (end + CHUNK_SECONDS)}, labelled=True)
        finding = f"The gate opens at {end + CHUNK_SECONDS:.2f} s; {end - begin:.2f} s before that chunk are replayed"
    ax[0].set_title(title or finding, loc="left", fontsize=11, pad=17)
    return ax


def states_strip(
    waveform: Any,
    states: Sequence[Mapping[str, Any]],
    marks: Mapping[str, float] | None = None,
    sample_rate_hz: int = 16_000,
    title: str = "",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """The user's waveform, the state of every chunk, and the head's probabilities.

    states  rows {"t_ms": end of the chunk, "state": 0 | 1 | 2 | None, "p0", "p1", "p2"}; None: not listening
    marks   name -> time in ms
    """
    ax = panels(ax, (1.2, 0.35, 1.2), (10, 4.2))
    draw_waveform(ax[0], waveform, sample_rate_hz, USER)
    draw_states(ax[1], states)
    draw_probabilities(ax[2], states)
    end = max([numbers(waveform).size / sample_rate_hz, *(row["t_ms"] / 1000 for row in states)])
    ax[2].set(xlabel="time (s)", xlim=(0, end))
    return finish_dialogue(ax, title or turn_taken(states), marks)


def session(
    user: Any,
    answer: Any,
    states: Sequence[Mapping[str, Any]],
    marks: Mapping[str, float] | None = None,
    answer_start_ms: float = 0.0,
    user_rate_hz: int = 16_000,
    answer_rate_hz: int = 24_000,
    title: str = "",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Both sides of a dialogue on one time axis with the state of every chunk between them."""
    ax = panels(ax, (1.2, 0.35, 1.2), (10, 4.2))
    draw_waveform(ax[0], user, user_rate_hz, USER)
    draw_states(ax[1], states)
    start = answer_start_ms / 1000
    draw_waveform(ax[2], answer, answer_rate_hz, ASSISTANT, start)
    for axis, name in ((ax[0], "user"), (ax[2], "assistant")):
        axis.set_ylabel(f"{name}\namplitude")
    ends = [numbers(user).size / user_rate_hz, start + numbers(answer).size / answer_rate_hz]
    ax[2].set(xlabel="time (s)", xlim=(0, max(ends)))
    return finish_dialogue(ax, title or turn_taken(states), marks)


def draw_states(ax: Axes, states: Sequence[Mapping[str, Any]], empty: str = "not listening") -> None:
    """One box a chunk: colour and hatch of its state, empty where nobody listens."""
    for row in states:
        state = row["state"]
        colour, hatch = STATE_LOOK[int(state)] if state is not None else (PAPER, "")
        box = Rectangle(
            (row["t_ms"] / 1000 - CHUNK_SECONDS, 0), CHUNK_SECONDS, 1, facecolor=colour, hatch=hatch
        )
        box.set(edgecolor=INK if state is not None else QUIET, linewidth=0.5)
        ax.add_patch(box)
    keys = [Patch(facecolor=c, hatch=h, edgecolor=INK) for c, h in STATE_LOOK] + [
        Patch(facecolor=PAPER, edgecolor=QUIET)
    ]
    names = [*(f"{i} {name}" for i, name in enumerate(STATE_NAMES)), empty]
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.02), borderaxespad=0.3)
    ax.legend(keys, names, ncols=4, fontsize=8, handlelength=1.6, **place)
    ax.set(ylim=(0, 1), yticks=[], ylabel="state")


def draw_probabilities(ax: Axes, states: Sequence[Mapping[str, Any]]) -> None:
    seconds = [row["t_ms"] / 1000 for row in states]
    for key, colour, line, marker in (("p1", ASSISTANT, "-", "o"), ("p2", INK, "--", "x")):
        name = STATE_NAMES[int(key[1])]
        # No line where the gate was closed and nothing was asked.
        values = [np.nan if row[key] is None else row[key] for row in states]
        ax.plot(seconds, values, line, color=colour, marker=marker, markersize=4, label=name)
    ax.axhline(0.5, color=QUIET, linewidth=1, linestyle=":")
    ax.set(ylim=(-0.05, 1.05), ylabel="probability")
    ax.legend(loc="upper left", fontsize=8)


def label_strip(
    waveform: Any,
    labels: Sequence[int],
    marks: Mapping[str, float] | None = None,
    sample_rate_hz: int = 16_000,
    title: str = "",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """A recording and the label of each of its chunks; a negative label (IGNORE) is left empty."""
    labels = [int(label) for label in labels]
    ax = panels(ax, (1.2, 0.5), (10, 2.5))
    draw_waveform(ax[0], waveform, sample_rate_hz, USER)
    rows = [
        {"t_ms": 1000 * CHUNK_SECONDS * (i + 1), "state": s if s >= 0 else None} for i, s in enumerate(labels)
    ]
    draw_states(ax[1], rows, "no label")
    ax[0].set_xlim(0, CHUNK_SECONDS * len(labels))
    ax[1].tick_params(labelbottom=False)
    ax[0].tick_params(labelbottom=True)
    ax[0].set_xlabel("time (s)", labelpad=1)
    return finish_dialogue(ax, title or turn_taken(rows), marks)


PIECES = {  # what a stretch of LLM positions holds: colour, hatch
    "text": (FROZEN, ""),
    "prompt": (TRAINED, "//"),
    "speech": (LISTENING, ".."),
    "answer": (ASSISTANT, "xx"),
}


def positions(pieces: Sequence[tuple[str, str, int]], title: str = "", ax: Axes | None = None) -> Axes:
    """A dialogue as the LLM reads it, one bar: pieces (name, kind, positions), kind one of PIECES."""
    ax, at, lifted = new_axes(ax, (10, 1.9)), 0, False
    for (name, kind, count), before in zip(pieces, [("", "", 99), *pieces], strict=False):
        lifted = min(count, before[2]) < 10 and not lifted  # two narrow pieces: the second name stands higher
        colour, hatch = PIECES[kind]
        ax.barh(0, count, left=at, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.5)
        ax.text(
            at + count / 2, 1.15 if lifted else 0.5, f"{name}\n{count}", ha="center", va="bottom", fontsize=8
        )
        at += count
    keys = [Patch(facecolor=c, hatch=h, edgecolor=INK) for c, h in PIECES.values()]
    ax.legend(keys, list(PIECES), ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    ax.set(xlabel="LLM position", xlim=(0, at), ylim=(-0.45, 1.9), yticks=[])
    return heading(ax, title or f"{at} positions")


def turn_taken(states: Sequence[Mapping[str, Any]]) -> str:
    """The finding of a state strip in one sentence."""
    for row in states:
        if row["state"]:
            return f"{STATE_NAMES[int(row['state'])]} at {row['t_ms'] / 1000:.2f} s"
    return "No turn was taken"


def finish_dialogue(ax: np.ndarray, title: str, marks: Mapping[str, float] | None) -> np.ndarray:
    """Marks through all panels, their names above the first, the title above the names."""
    rows = [draw_marks(axis, marks, labelled=axis is ax[0]) for axis in ax]
    ax[0].set_title(title, loc="left", fontsize=11, pad=6 + 11 * rows[0])
    return ax


def latency_waterfall(parts: Mapping[str, float | None], title: str = "", ax: Axes | None = None) -> Axes:
    """Milliseconds of each part, one after the other; None is drawn as not reached, "total" is left out."""
    rows = {name: ms for name, ms in parts.items() if name != "total"}
    ax, at = new_axes(ax, (10, 0.6 + 0.45 * len(rows))), 0.0
    total = sum(ms for ms in rows.values() if ms is not None)
    for index, ms in enumerate(rows.values()):
        colour, hatch = BARS[index % 2]
        ax.barh(index, ms or 0, left=at, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.5)
        at += ms or 0
        ax.text(
            at + 0.008 * max(total, 1),
            index,
            "not reached" if ms is None else f"{ms:.0f} ms",
            va="center",
            fontsize=9,
        )
    ax.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    ax.set(
        xlabel="time since the end of speech (ms)",
        xlim=(0, max(1.12 * total, 1)),
        ylim=(len(rows) - 0.5, -0.5),
    )
    slowest = max((name for name in rows if rows[name] is not None), key=lambda name: rows[name], default="")
    return heading(
        ax, title or f"{total:.0f} ms in all; the longest part: {slowest.replace('_', ' ') or 'none'}"
    )


def write_architecture(path: Path = SVG_PATH) -> Path:
    """The README's figure as svg: text as text and no date, so that it only changes when the figure does."""
    with plt.rc_context():
        style()
        figure = architecture().figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


if __name__ == "__main__":
    plt.switch_backend("Agg")
    print(f"wrote {write_architecture().relative_to(SVG_PATH.parents[2])}")
