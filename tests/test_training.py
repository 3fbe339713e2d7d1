"""training.py: the loop learns, repeats, resumes, and leaves frozen parts alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from freeze_omni_lite import ranks, scales, training
from freeze_omni_lite.errors import FrozenChanged, InputError, UserError
from freeze_omni_lite.fingerprint import digest, fingerprint

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Float32 on the CPU, whatever this machine has."""
    monkeypatch.setenv("FREEZE_OMNI_DEVICE", "cpu")
    monkeypatch.setenv("FREEZE_OMNI_PRECISION", "no")


class Regression(nn.Module):
    """A two-layer network with dropout and a moving-average buffer that the loss depends on."""

    def __init__(self, dropout: float = 0.2, moving: bool = True) -> None:
        super().__init__()
        self.moving = moving
        self.inner = nn.Linear(4, 16)
        self.outer = nn.Linear(16, 1)
        self.idle = nn.Linear(2, 2)  # a trained part that takes no part in the loss, as in a warm start
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("level", torch.zeros(()))

    def forward(self, batch):
        if self.training and self.moving:
            self.level = 0.9 * self.level + 0.1 * batch["x"].mean()  # replaced, not changed in place
        y = self.outer(self.dropout(torch.relu(self.inner(batch["x"])))) + self.level
        loss = (y - batch["y"]).square().mean()
        return {"loss": loss, "level": self.level.detach()}


class WithFrozen(Regression):
    def __init__(self, touch: bool = False) -> None:
        super().__init__(dropout=0.0)
        self.big, self.touch = nn.Linear(4, 4), touch

    def forward(self, batch):
        assert not self.big.training
        if self.touch:
            self.big.bias.data += 1e-3
        return super().forward({**batch, "x": self.big(batch["x"])})


def batches(step: int, rank: int, world: int) -> dict:
    generator = torch.Generator().manual_seed(step * world + rank)
    x = torch.randn(8, 4, generator=generator)
    return {"x": x, "y": x.sum(dim=1, keepdim=True), "seconds": 2.0}


def preset(**changes):
    common = dict(steps=12, warmup_steps=2, save_every=6, report_every=4, learning_rate=1e-2)
    return scales.load("encoder_ctc", "tiny", **(common | changes))


def build(seed: int = 3, **settings) -> Regression:
    training.seed_all(seed)
    return Regression(**settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    return fingerprint(a) == fingerprint(b)


def losses(history) -> list[dict]:
    timed = ("seconds", "audio_seconds_per_second")
    return [{name: value for name, value in row.items() if name not in timed} for row in history.rows]


def test_overfits_one_batch(tmp_path, capsys):
    stage = Regression(dropout=0.0)
    history = training.fit(
        stage, lambda *_: batches(0, 0, 1), preset(steps=200, learning_rate=3e-2), tmp_path
    )
    steps, values = history.series("loss")
    assert values[-1] < 0.01 * values[0] and steps[-1] == 200
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 50 and "200/200" in lines[-1] and "audio-s/s" in lines[-1] and "left" in lines[-1]
    assert training.read_rows(tmp_path / "metrics.jsonl") == history.rows
    assert not stage.training


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("report_every", [4, 5])
def test_resume_equals_uninterrupted_bit_for_bit(tmp_path, accumulate, report_every, capsys):
    settings = preset(accumulate=accumulate, report_every=report_every)
    whole = build()
    uninterrupted = training.fit(whole, batches, settings, tmp_path / "whole")

    def broken(step, rank, world):
        if step == 8 * accumulate:
            raise KeyboardInterrupt
        return batches(step, rank, world)

    first, second = build(), build()
    with pytest.raises(KeyboardInterrupt):
        training.fit(first, broken, settings, tmp_path / "halves")
    resumed = training.fit(second, batches, settings, tmp_path / "halves")
    assert "resumed after step 6" in capsys.readouterr().out
    assert same(whole, second) and not same(whole, build())
    assert losses(resumed) == losses(uninterrupted)
    assert len(training.read_rows(tmp_path / "halves" / "metrics.jsonl")) == len(uninterrupted.rows)

    third = build()  # a finished run that was not saved yet is not trained again
    assert losses(training.fit(third, batches, settings, tmp_path / "halves")) == losses(uninterrupted)
    assert same(whole, third)


def test_resume_of_another_run_is_set_aside(tmp_path, capsys):
    training.fit(build(), batches, preset(), tmp_path)
    other = training.fit(build(), batches, preset(learning_rate=2e-2), tmp_path)
    assert "learning_rate differ" in capsys.readouterr().out
    assert other.rows[0]["step"] == 4
    assert len(list(tmp_path.glob("resume-*.pt"))) == 1
    training.fit(build(), batches, preset(learning_rate=2e-2, report_every=3), tmp_path)
    assert "resumed" in capsys.readouterr().out  # how often it reports makes no other run
    training.fit(build(), batches, preset(learning_rate=2e-2), tmp_path, seed=2)
    assert "seed differ" in capsys.readouterr().out


def test_resume_notes_other_initial_weights(tmp_path, capsys):
    training.fit(build(3), batches, preset(), tmp_path)
    training.fit(build(4), batches, preset(), tmp_path)
    assert "began from other weights" in capsys.readouterr().out


def test_no_resume_trains_from_the_start(tmp_path, capsys):
    training.fit(build(), batches, preset(), tmp_path)
    history = training.fit(build(), batches, preset(), tmp_path, resume=False)
    assert len(history.rows) == 3 and "resumed" not in capsys.readouterr().out


def test_unreadable_resume_file_is_one_sentence(tmp_path):
    (tmp_path / "resume.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="delete it to train from the start"):
        training.fit(build(), batches, preset(), tmp_path)


def test_evaluate_joins_the_rows_and_leaves_the_run_alone(tmp_path):
    def evaluate(stage):
        assert not stage.training
        return {"noise": torch.randn(()).item(), "answer": 42}

    plain, measured = build(), build()
    training.fit(plain, batches, preset(), tmp_path / "plain")
    history = training.fit(measured, batches, preset(), tmp_path / "measured", evaluate=evaluate)
    assert history.series("answer") == ([6, 12], [42.0, 42.0])
    assert same(plain, measured)


def test_frozen_parts_stay(tmp_path, capsys):
    stage = WithFrozen()
    before = digest(fingerprint(stage.big))
    training.fit(stage, batches, preset(), tmp_path, frozen={"big": stage.big})
    assert digest(fingerprint(stage.big)) == before
    assert "big.weight" not in torch.load(tmp_path / "resume.pt", weights_only=True)["tensors"]


def test_a_touched_frozen_tensor_is_named(tmp_path):
    stage = WithFrozen(touch=True)
    with pytest.raises(FrozenChanged, match=r"1 tensors of the frozen part 'llm' changed .* first: bias"):
        training.fit(stage, batches, preset(), tmp_path, frozen={"llm": stage.big})
    assert not (tmp_path / "resume.pt").exists()  # a second try must not skip the training and pass


def test_only_the_given_parts_train(tmp_path):
    stage = build()
    inner, outer = digest(fingerprint(stage.inner)), digest(fingerprint(stage.outer))
    training.fit(stage, batches, preset(), tmp_path, parts={"outer": stage.outer})
    assert digest(fingerprint(stage.inner)) == inner and digest(fingerprint(stage.outer)) != outer


def test_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    def bad(step, rank, world):
        batch = batches(step, rank, world)
        return batch if step < 3 else {**batch, "x": batch["x"] * float("nan")}

    with pytest.raises(UserError, match="loss is nan at step 4 of stage 'encoder_ctc'"):
        training.fit(build(), bad, preset(), tmp_path)


def test_counts_add_up_and_share_nothing_twice(capsys):
    stage = WithFrozen()
    training.show_counts(stage, {"llm": stage.big})
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["llm"] == ["0", "20"] and rows["inner"] == ["80", "0"] and rows["together"] == ["103", "20"]


def test_learning_rate_schedules():
    rates = {s: [training.learning_rate(preset(schedule=s, steps=100, warmup_steps=10), i) for i in range(100)]
             for s in ("cosine", "warmup", "constant")}  # fmt: skip
    for values in rates.values():
        assert values[0] == pytest.approx(1e-3) and max(values) == values[9] == pytest.approx(1e-2)
    assert rates["cosine"][-1] == pytest.approx(1e-3)
    assert rates["warmup"][39] == pytest.approx(0.5e-2)
    assert rates["constant"][-1] == 1e-2
    with pytest.raises(InputError, match="schedule"):
        training.learning_rate(preset(schedule="step"), 50)


def test_device_and_precision(monkeypatch):
    assert training.device() == torch.device("cpu") and training.precision(torch.device("cpu")) == "no"
    with pytest.raises(InputError, match="not available on this machine"):
        training.device("abacus")
    monkeypatch.setenv("FREEZE_OMNI_PRECISION", "fp8")
    with pytest.raises(InputError, match="no or bf16"):
        training.precision(torch.device("cpu"))
    monkeypatch.delenv("FREEZE_OMNI_PRECISION")
    faster = ranks.bf16_speedup_on_cpu()
    assert faster > 0
    assert training.precision(torch.device("cpu")) == ("bf16" if faster > ranks.CLEARLY_FASTER else "no")


def test_bf16_trains_on_a_cpu_and_leaves_float32_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZE_OMNI_PRECISION", "bf16")
    stage = Regression(dropout=0.0)
    history = training.fit(stage, lambda *_: batches(0, 0, 1), preset(steps=60, learning_rate=3e-2), tmp_path)
    values = history.series("loss")[1]
    assert values[-1] < values[0] and stage.inner.weight.dtype == torch.float32


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_training import Regression, batches, build, preset, training
stage = build(3 + training.rank(), moving=False)  # the ranks start from rank 0's weights
history = training.fit(stage, batches, preset(schedule="constant", steps=5, report_every=5), sys.argv[2])
assert training.world() == 2 and torch.distributed.is_initialized()
parameters = {name: p.detach() for name, p in stage.named_parameters()}
torch.save({"loss": history.rows[-1]["loss"], **parameters}, f"{sys.argv[2]}/rank{training.rank()}.pt")
training.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_equal_one_with_doubled_accumulation(tmp_path):
    """Weights agree to 1e-5. Without the moving average: each rank updates it with its own batch."""
    (tmp_path / "script.py").write_text(RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
               f"--master_port={port}", str(tmp_path / "script.py"), str(ROOT / "tests"), str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5/5") == 1  # rank 0 alone reports
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    settings = preset(schedule="constant", steps=5, report_every=5, accumulate=2)
    single = build(moving=False)
    history = training.fit(single, batches, settings, tmp_path / "single")
    for name, parameter in single.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), atol=1e-5, rtol=0)
    assert first["loss"] == pytest.approx(history.rows[-1]["loss"], abs=1e-5)
