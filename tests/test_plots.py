"""Figures draw what they are given, colours keep their meaning, players carry their sound inside the page."""

import base64
import io
import re
import wave

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from freeze_omni_lite import plots, widgets
from freeze_omni_lite.attention import chunk_mask
from freeze_omni_lite.errors import InputError

RATE_HZ = 16_000
CLIP = 0.3 * torch.sin(torch.arange(RATE_HZ) * 0.05)
STATES = [
    {
        "t_ms": 160 * (i + 1),
        "state": s,
        "p0": None if s is None else 0.8,
        "p1": None if s is None else 0.1,
        "p2": 0.1,
    }
    for i, s in enumerate([None, 0, 0, 0, 1])
]
MARKS = {"end_of_speech": 600, "decision": 800}


@pytest.fixture(autouse=True)
def _close_figures():
    with plt.rc_context():
        plots.style()
        yield
    plt.close("all")


def first(drawn):
    return np.asarray(drawn, dtype=object).flat[0]


def words(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


FIGURES = {
    "architecture": lambda: plots.architecture(train="adapter", captions={"llm": "135 M"}),
    "waveform_and_mel": lambda: plots.waveform_and_mel(CLIP, RATE_HZ, chunks=True),
    "spectrogram_pair": lambda: plots.spectrogram_pair(CLIP, CLIP * 0.5, RATE_HZ),
    "tokens_over_time": lambda: plots.tokens_over_time(torch.tensor([3, 3, 7, 1])),
    "loss_curve": lambda: plots.loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]),
    "learning_curves": lambda: plots.learning_curves({"a": [(0, 1.0), (1, 0.5)], "b": []}, title="a falls"),
    "error_bars": lambda: plots.error_bars({"test": {"CTC": 3.0, "LLM": 2.0}}, title="the LLM helps"),
    "gate": lambda: plots.gate(CLIP, [False] * 3 + [True] * 4, look_back_chunks=2),
    "mask": lambda: plots.mask(chunk_mask(8, 4, 1), 4),
    "ctc_trellis": lambda: plots.ctc_trellis(torch.eye(4).log(), units="-abc"),
    "codebook_usage": lambda: plots.codebook_usage([4, 4, 0, 0]),
    "directions": lambda: plots.directions([[2, 0], [0, 1]], [0, 0], [[1, 0], [-1, 0]]),
    "confusion": lambda: plots.confusion([[3, 0, 0], [0, 2, 1], [0, 0, 0]]),
    "states_strip": lambda: plots.states_strip(CLIP, STATES, MARKS),
    "label_strip": lambda: plots.label_strip(CLIP, [0, 0, 0, 1, -100, -100], MARKS),
    "positions": lambda: plots.positions([("system", "text", 9), ("prompts", "prompt", 25)]),
    "session": lambda: plots.session(CLIP, CLIP, STATES, MARKS, answer_start_ms=800),
    "latency_waterfall": lambda: plots.latency_waterfall({"hear": 100.0, "think": None, "total": 100.0}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_draws_and_its_title_states_something(name):
    ax = first(FIGURES[name]())
    ax.figure.savefig(io.BytesIO())
    assert ax.get_title(loc="left")


@pytest.mark.parametrize(
    "name",
    sorted(set(FIGURES) - {"architecture", "confusion", "directions", "mask", "ctc_trellis", "positions"}),
)
def test_axes_with_a_quantity_name_its_unit(name):
    labels = [ax.get_xlabel() for ax in first(FIGURES[name]()).figure.axes]
    if name != "error_bars":
        assert any("(s)" in x or "(ms)" in x or x == "step" or x.startswith("codes") for x in labels), labels


def test_single_figures_draw_on_given_axes():
    _, ax = plt.subplots()
    assert plots.mask(chunk_mask(4, 2), 2, ax=ax) is ax
    assert plots.codebook_usage([1, 2], ax=ax) is ax


def test_panels_draw_on_given_axes():
    _, axes = plt.subplots(3, 1)
    assert first(plots.session(CLIP, CLIP, STATES, ax=axes)) is axes[0]


@pytest.mark.parametrize("box", [*plots.BOXES, *plots.PARTS_OF])
def test_every_box_can_be_lit(box):
    faces = {patch.get_facecolor() for patch in plots.architecture(train=box, frozen=()).patches}
    assert matplotlib.colors.to_rgba(plots.TRAINED) in faces


def test_unknown_box_names_the_near_miss():
    with pytest.raises(InputError, match="did you mean adapter"):
        plots.architecture(train="adaptor")


def test_architecture_text_stays_inside_the_figure_and_boxes():
    ax = plots.architecture(train=[*plots.BOXES])
    ax.figure.canvas.draw()
    renderer = ax.figure.canvas.get_renderer()
    for text in ax.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1, text.get_text()
    extents = [t.get_window_extent(renderer) for t in ax.texts if t.get_text()]
    clashes = [(i, j) for i, a in enumerate(extents) for j, b in enumerate(extents[:i]) if a.overlaps(b)]
    assert not clashes, [(ax.texts[i].get_text(), ax.texts[j].get_text()) for i, j in clashes]


def test_committed_svg_is_the_figure_of_today():
    committed = plots.SVG_PATH.read_text(encoding="utf-8")
    shown = [line for t in plots.architecture().texts for line in t.get_text().splitlines() if line]
    missing = [
        line for line in shown if line.replace("'", "&apos;") not in committed and line not in committed
    ]
    assert not missing, f"run python -m freeze_omni_lite.plots: {missing}"
    assert len(committed) < 100_000


def test_waveform_keeps_peaks_of_long_clips():
    clip = np.zeros(200_000)
    clip[123_456] = 0.9
    ax = first(plots.waveform_and_mel(clip, RATE_HZ, mels=np.zeros((10, 80))))
    assert max(path.vertices[:, 1].max() for path in ax.collections[0].get_paths()) == pytest.approx(0.9)


def test_perplexity_of_equal_use_is_the_number_of_codes():
    assert "4 of 4 codes in use, perplexity 4" in plots.codebook_usage([5, 5, 5, 5]).get_title(loc="left")


def test_latency_adds_up_and_names_the_longest_part():
    ax = plots.latency_waterfall({"to_text": 40.0, "to_speech": 60.0, "to_pcm": None})
    assert ax.get_title(loc="left") == "100 ms in all; the longest part: to speech"
    assert "not reached" in words(ax.figure)


def test_states_are_told_apart_without_colour():
    assert len({hatch for _, hatch in plots.STATE_LOOK}) == 3
    assert len({(line, marker) for _, line, marker in plots.LINES}) == len(plots.LINES)


def test_no_turn_is_said():
    quiet = [dict(row, state=0 if row["state"] is not None else None) for row in STATES]
    assert first(plots.states_strip(CLIP, quiet)).get_title(loc="left") == "No turn was taken"


# --- players and sliders


def sounds(players) -> list[tuple[int, np.ndarray]]:
    found = []
    for data in re.findall(r"base64,([^\"]+)", players._repr_html_()):
        with wave.open(io.BytesIO(base64.b64decode(data))) as file:
            found.append(
                (file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767)
            )
    return found


def test_players_match_levels_and_keep_their_rates():
    noise = np.random.default_rng(1).normal(size=24_000)
    players = widgets.listen({"loud": noise * 0.3, "quiet": CLIP * 0.01}, {"loud": 24_000, "quiet": RATE_HZ})
    (rate_a, a), (rate_b, b) = sounds(players)
    assert (rate_a, rate_b) == (24_000, RATE_HZ)
    assert np.sqrt((a**2).mean()) == pytest.approx(np.sqrt((b**2).mean()), rel=0.01)
    assert "http" not in players and repr(players) == "<2 audio players>"


def test_players_never_clip_and_stop_after_ten_seconds():
    spike = np.zeros(20 * RATE_HZ)
    spike[100] = 1.0
    for _, sound in sounds(widgets.listen({"spike": spike, "tone": CLIP}, RATE_HZ)):
        assert np.abs(sound).max() < 1.0 and sound.size <= 10 * RATE_HZ


def test_silence_stays_silence():
    ((_, sound),) = sounds(widgets.listen({"silence": np.zeros(100)}, RATE_HZ))
    assert not sound.any()


def test_labels_are_escaped():
    assert "<script>" not in widgets.listen({"<script>": CLIP}, RATE_HZ)


@pytest.mark.parametrize("clip", [[], [float("nan")]])
def test_bad_clip_is_refused(clip):
    with pytest.raises(InputError, match="clip 'x'"):
        widgets.listen({"x": clip}, RATE_HZ)


def test_around_draws_the_first_choice_without_a_person():
    seen = []

    def plot(size, chunk):
        seen.append((size, chunk))
        return plots.mask(chunk_mask(size, chunk), chunk)

    ax = widgets.around(plot, size=8, chunk=[4, 1, 2])
    assert seen == [(8, 4)] and ax.get_title(loc="left")


def test_sliders_redraw_in_place(monkeypatch):
    pytest.importorskip("ipywidgets")
    import IPython.display

    shown = []

    class Handle:
        def update(self, figure):
            shown.append(figure)

    def show(thing, display_id=False):
        shown.append(thing)
        return Handle()

    monkeypatch.setattr(IPython.display, "display", show)
    monkeypatch.setattr(widgets, "is_live", lambda: True)
    widgets.around(lambda chunk: plots.mask(chunk_mask(8, chunk), chunk), chunk=[4, 1, 2])
    figure, row = shown
    row.children[0].value = 1
    assert shown[2] is not figure and row.children[0].description == "chunk"
