"""A run continues on more or fewer devices and processes with the losses of an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from test_multiprocess import command, environ, run_processes

SIZES = (
    "--mesh.data",
    "1",
    "--mesh.context",
    "-1",
    "--train.batch_size",
    "2",
    "--train.steps",
    "24",
    "--log.every",
    "1",
)
FLAGS = (*SIZES, "--checkpoint.every", "4", "--checkpoint.keep", "9")


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_bytes(rng.integers(97, 107, 20_000, dtype=np.uint8).tobytes())
    return tmp_path


def train(directory: Path, name: str, *flags: str, processes: int = 1) -> None:
    words = command(directory, *FLAGS, "--data.path", str(directory / "text.txt"), "--name", name, *flags)
    if processes > 1:
        done = run_processes(*[words] * processes)
        assert [status for *_, status in done] == [0] * processes, done
        assert ["run directory" in stdout for stdout, *_ in done] == [True] + [False] * (processes - 1)
    else:
        done = subprocess.run(words, env=environ(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def losses(directory: Path, name: str) -> dict[tuple[str, int], float]:
    rows = map(json.loads, (directory / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {(key, row["step"]): row[key] for row in rows for key in ("loss", "eval/loss") if key in row}


def check_losses(directory: Path, name: str) -> None:
    expected, found = losses(directory, "whole"), losses(directory, name)
    assert sorted(step for key, step in found if key == "loss") == list(range(1, 25))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[each] for each in expected], list(expected.values()), rtol=1e-6)


def resume_from(directory: Path, name: str, step: int) -> None:
    """Removes the checkpoints after `step`."""
    for path in (directory / "runs" / name / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.slow
def test_a_run_changes_its_devices_and_processes(text):
    """8, 4 and 8 devices; 2 processes of 2 devices, one device, 2 processes of 2 devices."""
    train(text, "whole", "--mesh.simulate", "8")
    shutil.copytree(text / "runs" / "whole", text / "runs" / "rings")
    changes = [("--mesh.simulate", "4"), ("--mesh.simulate", "8")]
    for step, change in zip((8, 16), changes, strict=True):
        resume_from(text, "rings", step)
        train(text, "rings", *change)
    check_losses(text, "rings")
    train(text, "both", "--mesh.simulate", "2", processes=2)
    check_losses(text, "both")
    for step, simulate, processes in ((8, "1", 1), (16, "2", 2)):
        resume_from(text, "both", step)
        train(text, "both", "--mesh.simulate", simulate, processes=processes)
    check_losses(text, "both")


@pytest.mark.slow
def test_a_killed_process_of_the_local_launcher_leaves_a_smaller_ring(text):
    """A ring of 8 in 4 processes loses one: 6 devices do not divide the rows, so it continues on 4 in 2 processes."""
    train(text, "whole", "--mesh.simulate", "8")
    words = command(text, *FLAGS, "--data.path", str(text / "text.txt"), "--name", "elastic")
    words += ["--processes", "4", "--simulate", "2", "--restarts", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environ(), **pipes) as launcher:
        metrics = text / "runs" / "elastic" / "metrics.jsonl"
        while launcher.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 9):
            time.sleep(0.02)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[2]), signal.SIGKILL)
        out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    assert "8 cpu devices" in out
    assert "4 cpu devices" in out
    lines = err.splitlines()
    assert "process 2 was killed by SIGKILL" in lines
    assert "restart 1 of 1 after status 137: 2 processes" in lines
    ended = f"(pid {children[2]}) ended unexpectedly; run the same command again to resume"
    assert sum(line.endswith(ended) for line in lines) == 3
    assert "Traceback" not in err
    check_losses(text, "elastic")
