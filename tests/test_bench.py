"""The bench measures real streams: rows for every variant, flat state, JSON with its conditions."""

import json

import pytest

from freeze_omni_lite import bench
from freeze_omni_lite.errors import InputError


def test_streams_are_measured_and_their_state_is_flat():
    rows = bench.measure([bench.features_stream(), bench.listening_stream("tiny")], packets=5)
    assert [row.variant for row in rows] == ["features", "encoder+adapter tiny float32"]
    assert all(row.median_ms > 0 and not row.state_grew for row in rows)
    assert len(bench.table(rows).splitlines()) == 3


def test_json_names_its_conditions(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.BENCHES, "streams", lambda: [bench.features_stream()])
    assert bench.main((), tmp_path / "bench.json") == 0
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["command"] == "freeze-omni bench streams" and stored["rows"][0]["variant"] == "features"
    assert {"date", "commit", "cpu", "threads", "torch"} <= set(stored)
    assert "features" in capsys.readouterr().out


def test_unknown_bench_names_the_near_miss():
    with pytest.raises(InputError, match="did you mean streams"):
        bench.main(["stream"])
