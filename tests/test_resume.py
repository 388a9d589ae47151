"""A run that is killed and started again ends with the same metrics as an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FAST_COMPILATION

from ringattn.runs.metrics import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = """
from ringattn.config import Checkpoint, Config, Data, Log, Mesh, Model, Optimizer, Train, Validation

config = Config(
    model=Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
    data=Data(path={text!r}, seq_len=64, validation=0.3),
    mesh=Mesh(context=2, simulate=2),
    optimizer=Optimizer(warmup_steps=10),
    train=Train(steps=200, batch_size=2),
    validation=Validation(every=50, batches=2),
    checkpoint=Checkpoint(every=20),
    log=Log(every=5, directory={runs!r}),
)
"""
STAGED = """
from dataclasses import replace
from ringattn.config import Stage
from tiny import config as tiny

config = replace(
    tiny,
    mesh=replace(tiny.mesh, data=-1, simulate=8),
    optimizer=replace(tiny.optimizer, warmup_steps=3),
    stages=(
        Stage(steps=12, seq_len=256, batch_size=4, context=2),
        Stage(steps=12, seq_len=512, batch_size=2, context=4, rope_theta=30_000.0, learning_rate=1e-3),
        Stage(steps=12, seq_len=1024, batch_size=1, context=8, rope_theta=100_000.0, learning_rate=1e-3),
    ),
    checkpoint=replace(tiny.checkpoint, every=5),
    log=replace(tiny.log, every=1),
)
"""


@pytest.fixture
def start(tmp_path):
    """start(name): a process of scripts/train.py."""
    for name, text in (("tiny", CONFIG), ("staged", STAGED)):
        (tmp_path / f"{name}.py").write_text(text.format(text=str(ROOT / "ringattn"), runs=str(tmp_path / "runs")))
    environ = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_COMPILATION}

    def start(name: str) -> subprocess.Popen[str]:
        path = tmp_path / "staged.py"
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(path), "--name", name]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def rows_without_times(path: Path) -> list[dict]:
    times = {"tokens_per_second", "step_seconds"}
    return [{name: value for name, value in row.items() if name not in times} for row in read_rows(path)]


@pytest.mark.slow
def test_a_run_killed_in_each_stage_is_resumed_bit_for_bit(start, tmp_path):
    """Rows of 256, 512 and 1,024 tokens, on rings of 2, 4 and 8."""
    killed, uninterrupted = (tmp_path / "runs" / name / "metrics.jsonl" for name in ("killed", "uninterrupted"))
    for stage, last in ((1, 12), (2, 24), (3, 36)):
        process = start("killed")
        while process.poll() is None and not any(row["step"] > last - 6 for row in read_rows(killed)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, out
        reached = read_rows(killed)[-1]
        assert reached["stage"] == stage
        assert reached["step"] < last
    out = finish(start("killed"))
    assert "stage 3 of 3, steps 25 to 36: 1 row of 1,024 tokens, 8 devices per row" in out
    out = finish(start("uninterrupted"))
    assert all(f"stage {stage} of 3" in out for stage in (1, 2, 3))
    assert rows_without_times(killed) == rows_without_times(uninterrupted)
    assert [row["step"] for row in rows_without_times(killed) if "loss" in row] == list(range(1, 37))
