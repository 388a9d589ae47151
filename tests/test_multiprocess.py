"""Training in two processes, each with half of the devices, as on two hosts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FLAGS = [
    *("--model.layers", "1", "--model.dim", "16", "--model.feed_forward", "32", "--model.head_dim", "8"),
    *("--data.seq_len", "64", "--train.steps", "3", "--validation.batches", "2", "--log.every", "1"),
]


def command(directory, *flags):
    script = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(ROOT / "configs/quickstart.py")]
    return [*script, "--log.directory", str(directory / "runs"), *FLAGS, *flags]


def environ():
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    # Without LLVM's optimizations, compiling takes half the time.
    return kept | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run_processes(*commands, directories=(None, None)):
    """Runs two commands, each in its directory, as one job. Returns (stdout, stderr, exit status) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = environ() | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(each, env=joined | {"JAX_PROCESS_ID": str(index)}, cwd=directory, **pipes)
        for index, (each, directory) in enumerate(zip(commands, directories, strict=True))
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(*output, process.returncode) for output, process in zip(outputs, processes, strict=True)]


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(40):
            (tmp_path / name / f"{number}.txt").write_bytes(rng.integers(97, 107, 100, dtype=np.uint8).tobytes())
    return tmp_path


def losses(directory, name):
    rows = map(json.loads, (directory / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows for key in ("loss", "eval/loss") if key in row]


def test_two_processes_train_like_one_and_their_run_is_resumed_by_one(text):
    data = "--data.path", str(text / "one")
    both = command(text, *data, "--mesh.simulate", "4", "--name", "both")
    done = run_processes(both, both)
    assert [status for *_, status in done] == [0, 0], done
    assert ["run directory" in stdout for stdout, *_ in done] == [True, False]  # only process 0 prints
    for name in ("single", "both"):  # the run of two processes is resumed by one
        steps = "4" if name == "both" else "3"
        done = subprocess.run(
            command(text, *data, "--name", name, "--train.steps", steps), env=environ(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "resuming from step 3" in done.stdout
    single, both = losses(text, "single"), losses(text, "both")
    assert (len(single), len(both)) == (4, 6)
    np.testing.assert_allclose(both[:4], single, rtol=1e-5)


@pytest.mark.parametrize("differs", ["data", "config"])
def test_processes_with_different_data_or_config_do_not_train_together(text, differs):
    directories = (text / "one", text / ("two" if differs == "data" else "one"))
    each = command(text, "--mesh.simulate", "4", "--data.path", "*.txt")
    other = [*each, "--train.seed", "1"] if differs == "config" else each
    done = run_processes(each, other, directories=directories)
    assert [status for *_, status in done] == [2, 2], done
    assert f"{differs} of process 0 differs from that of process 1; start all" in done[0][1]
    assert not (text / "runs").exists()


def test_processes_join_into_one_mesh():
    code = """
import jax, numpy as np
from ringattn import config
from ringattn.mesh.axes import TOKENS, place
from ringattn.mesh.devices import start
mesh = start(config.Mesh(simulate=2))
rows = place(np.arange(8, dtype=np.int32)[None], mesh, TOKENS)
with jax.set_mesh(mesh):
    print(jax.process_count(), mesh.shape["context"], int(jax.jit(lambda x: x.sum())(rows)), flush=True)
"""
    for stdout, stderr, _ in run_processes(*[[sys.executable, "-c", code]] * 2):
        assert "2 4 28\n" in stdout, stderr
