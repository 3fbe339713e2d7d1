"""Every preset is complete, of one type and sourced; mistakes are answered with near misses."""

import copy
import pickle

import pytest

from freeze_omni_lite import scales
from freeze_omni_lite.errors import InputError

ROWS = [(stage, name, row) for stage, rows in scales.STAGES.items() for name, row in rows.items()]


@pytest.mark.parametrize("stage, name, row", ROWS, ids=[f"{stage}.{name}" for stage, name, _ in ROWS])
def test_every_row_has_four_values_of_one_type_and_a_source(stage, name, row):
    *values, source, meaning = row
    assert len(values) == len(scales.SCALES)
    assert len({type(value) for value in values}) == 1
    assert source in scales.SOURCES and isinstance(meaning, str) and meaning


def test_presets_read_as_attributes_and_print_as_a_table(capsys):
    preset = scales.load("encoder_ctc", "tiny", steps=3)
    assert (preset.steps, preset.width, preset.stage, preset.scale) == (3, 64, "encoder_ctc", "tiny")
    assert preset.values()["steps"] == 3
    preset.show()
    printed = capsys.readouterr().out
    assert "[tiny]" in printed and "3*" in printed and "stated" in printed
    assert len(printed.splitlines()) == 1 + len(scales.STAGES["encoder_ctc"])


def test_presets_survive_copy_and_pickle():
    preset = scales.load("codec", "laptop", steps=7)
    assert copy.deepcopy(preset) == preset == pickle.loads(pickle.dumps(preset))


@pytest.mark.parametrize(
    "arguments, changes, words",
    [
        (("encoder_ctx", "tiny"), {}, "unknown stage.*did you mean encoder_ctc"),
        (("encoder_ctc", "laptob"), {}, "unknown scale.*did you mean laptop"),
        (("encoder_ctc", "tiny"), {"learning_rat": 1.0}, "unknown setting.*did you mean learning_rate"),
        (("encoder_ctc", "tiny"), {"steps": 1.5}, "encoder_ctc.steps is 1.5, expected int"),
        (("encoder_ctc", "tiny"), {"dynamic_chunks": 1}, "expected bool"),
        (("encoder_ctc", "tiny"), {"steps": True}, "expected int"),
    ],
)
def test_mistakes_name_near_misses(arguments, changes, words):
    with pytest.raises(InputError, match=words):
        scales.load(*arguments, **changes)


def test_whole_numbers_pass_as_floats_and_unknown_attributes_are_errors():
    preset = scales.load("encoder_ctc", "tiny", dropout=0)
    assert preset.dropout == 0.0 and isinstance(preset.dropout, float)
    with pytest.raises(AttributeError, match="did you mean width"):
        _ = preset.widht


@pytest.mark.parametrize("scale", scales.SCALES)
def test_stages_that_meet_agree(scale):
    encoder, nar, prefix = (
        scales.load(s, scale) for s in ("encoder_ctc", "decoder_nar_ar", "decoder_prefix")
    )
    assert encoder.width % encoder.heads == 0 and encoder.chunk_frames == 4
    assert nar.width % nar.heads == 0 and nar.layers == prefix.layers
    assert len({scales.load(s, scale).llm for s in scales.STAGES if "llm" in scales.STAGES[s]}) == 1
