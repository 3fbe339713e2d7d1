"""Players and sliders for notebooks. The static figure always comes first: a page reads well without sliders.

Players carry their sound inside the page: an exported notebook plays without a network or a folder beside it.
"""

import base64
import html
import io
import wave
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .errors import InputError

LISTEN_SECONDS = 10.0
LISTEN_LEVEL = 0.1  # root mean square that all players of a row are brought to: -20 dB of full scale


class Players(str):
    """A row of labelled audio players: HTML that Jupyter and nbconvert show as it is."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<{self.count('<audio')} audio players>"


def listen(
    clips: Mapping[str, Any], rate: int | Mapping[str, int], seconds: float = LISTEN_SECONDS
) -> Players:
    """Labelled players in one row, levels matched, each cut to its first `seconds`.

    clips   label -> waveform (samples,), a tensor, array or list
    rate    sample rate in Hz, one for all or label -> rate
    Raises InputError for a clip without samples or with values that are not finite.
    """
    cut = {}
    for label, clip in clips.items():
        rate_hz = rate[label] if isinstance(rate, Mapping) else rate
        cut[label] = (samples_of(label, clip)[: round(seconds * rate_hz)], rate_hz)
    level = common_level([clip for clip, _ in cut.values()])
    cells = [player(label, at_level(clip, level), rate_hz) for label, (clip, rate_hz) in cut.items()]
    return Players(f'<div style="display:flex;flex-wrap:wrap;gap:1.2em">{"".join(cells)}</div>')


def samples_of(label: str, clip: Any) -> np.ndarray:
    clip = (
        clip.detach().cpu().float().numpy() if hasattr(clip, "detach") else np.asarray(clip, dtype=np.float32)
    )
    clip = clip.reshape(-1)
    if clip.size == 0 or not np.isfinite(clip).all():
        raise InputError(f"the clip {label!r} is empty or holds NaN: give at least one finite sample.")
    return clip


def common_level(clips: list[np.ndarray]) -> float:
    """The level that every clip can be brought to without clipping, at most LISTEN_LEVEL."""
    loudest = [level_of(clip) / np.abs(clip).max() for clip in clips if np.abs(clip).max() > 0]
    return min([LISTEN_LEVEL, *(0.99 * room for room in loudest)])


def level_of(clip: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(clip, dtype=np.float64))))


def at_level(clip: np.ndarray, level: float) -> np.ndarray:
    """The clip scaled to a root mean square of `level`; silence stays silence."""
    own = level_of(clip)
    return clip * (level / own) if own > 0 else clip


def player(label: str, clip: np.ndarray, rate_hz: int) -> str:
    """One labelled player with its sound as 16-bit wav in the page."""
    sound = base64.b64encode(wav_bytes(clip, rate_hz)).decode()
    name = html.escape(label)
    audio = (
        f'<audio controls preload="metadata" aria-label="{name}" src="data:audio/wav;base64,{sound}"></audio>'
    )
    return f'<figure style="margin:0"><figcaption>{name}</figcaption>{audio}</figure>'


def wav_bytes(clip: np.ndarray, rate_hz: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((np.clip(clip, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def around(plot: Callable[..., Any], **choices: Any) -> Any:
    """Draw `plot` with the first of each choice; with a person at a live kernel, add a slider per choice.

    choices   name -> list or range of values, the first is drawn; any other value is passed on as it is
    Returns what `plot` returned for the static figure.

    `around(lambda chunk: plots.mask(chunk_mask(32, chunk), chunk), chunk=[4, 1, 2, 8])`
    """
    options = {name: list(values) for name, values in choices.items() if isinstance(values, (list, range))}
    fixed = {name: value for name, value in choices.items() if name not in options}
    drawn = plot(**fixed, **{name: values[0] for name, values in options.items()})
    if options and is_live():
        add_sliders(plot, options, fixed, figure_of(drawn))
    return drawn


def is_live() -> bool:
    """Whether a person sits at this kernel and ipywidgets is there.

    The sign: papermill and nbconvert never let a cell ask for input, JupyterLab does.
    """
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython

        request = get_ipython().kernel.get_parent("shell")["content"]
    except (ImportError, AttributeError, KeyError, TypeError):
        return False
    return bool(request.get("allow_stdin"))


def figure_of(drawn: Any) -> Any:
    """The figure behind one axes or an array of them."""
    return np.asarray(drawn, dtype=object).flat[0].figure


def add_sliders(
    plot: Callable[..., Any], options: dict[str, list], fixed: dict[str, Any], figure: Any
) -> None:
    """Show the figure, and below it one slider per option that draws it again in its place."""
    import ipywidgets
    import matplotlib.pyplot as plt
    from IPython.display import display

    shown = display(figure, display_id=True)
    plt.close(figure)
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=sorted(values), value=values[0], description=name.replace("_", " ")
        )
        for name, values in options.items()
    }

    def redraw(_change: Any) -> None:
        fresh = figure_of(plot(**fixed, **{name: slider.value for name, slider in sliders.items()}))
        shown.update(fresh)
        plt.close(fresh)

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    display(ipywidgets.HBox(list(sliders.values())))
