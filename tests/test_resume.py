"""A run that is killed at any moment and started again ends as one that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringattn.training.checkpoint import saved_steps
from ringattn.training.metrics import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = """
from ringattn.config import Attention, Checkpoint, Config, Data, Evaluate, Log, Mesh, Model, Optimizer, Train

config = Config(
    model=Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
    data=Data(path={text!r}, seq_len=64, validation=0.3),
    mesh=Mesh(context=2, simulate=2),
    optimizer=Optimizer(warmup_steps=10),
    train=Train(steps=200, batch_size=2),
    evaluate=Evaluate(every=50, batches=2),
    checkpoint=Checkpoint(every=20),
    log=Log(every=5, directory={runs!r}),
)
"""


@pytest.fixture
def start(tmp_path):
    """start(name): the run as a user starts it, a process of its own."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(text=str(ROOT / "ringattn"), runs=str(tmp_path / "runs")))
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(path), "--name", name]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kept(folder: Path) -> list[dict]:
    """The rows, without what depends on the clock."""
    clock = {"tokens_per_second", "step_seconds"}
    return [{name: value for name, value in row.items() if name not in clock} for row in read_rows(folder)]


def test_killed_and_started_again_is_the_same_to_the_last_bit(start, tmp_path):
    killed, whole = (tmp_path / "runs" / name / "metrics.jsonl" for name in ("killed", "whole"))
    process = start("killed")
    while process.poll() is None and not any(row["step"] > 50 for row in read_rows(killed)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = read_rows(killed)[-1]["step"]
    assert reached < 200

    out = finish(start("killed"))
    assert "going on from step" in out
    finish(start("whole"))
    assert kept(killed) == kept(whole)
    assert kept(killed)[-1]["step"] == 200
    assert saved_steps(killed.parent / "checkpoints")[0] == 200
