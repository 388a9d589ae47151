"""Training over two processes, each with half of the devices, as on two hosts."""

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
    *("--data.seq_len", "64", "--train.steps", "3", "--evaluate.batches", "2", "--log.every", "1"),
]


def command(folder, *flags):
    script = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(ROOT / "configs/quickstart.py")]
    return [*script, "--log.directory", str(folder / "runs"), *FLAGS, *flags]


def environ():
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return kept | {"PYTHONPATH": str(ROOT)}


def over_two(*commands, folders=(None, None)):
    """What each of two processes said, and its exit status; each is started in its folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = environ() | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(each, env=joined | {"JAX_PROCESS_ID": str(own)}, cwd=folder, **pipes)
        for own, (each, folder) in enumerate(zip(commands, folders, strict=True))
    ]
    try:
        said = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    return [(*words, process.returncode) for words, process in zip(said, both, strict=True)]


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(40):
            (tmp_path / name / f"{number}.txt").write_bytes(rng.integers(97, 107, 100, dtype=np.uint8).tobytes())
    return tmp_path


def losses(folder, name):
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows for key in ("loss", "eval/loss") if key in row]


def test_two_processes_train_as_one_does_and_one_goes_on_from_them(text):
    data = "--data.path", str(text / "one")
    both = command(text, *data, "--mesh.simulate", "4", "--name", "both")
    done = over_two(both, both)
    assert [status for *_, status in done] == [0, 0], done
    assert ["run folder" in said for said, *_ in done] == [True, False]  # the first alone speaks
    for name in ("alone", "both"):  # the second is gone on with, by the one process
        more = "4" if name == "both" else "3"
        done = subprocess.run(
            command(text, *data, "--name", name, "--train.steps", more), env=environ(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stdout
    alone, both = losses(text, "alone"), losses(text, "both")
    assert (len(alone), len(both)) == (4, 6)
    np.testing.assert_allclose(both[:4], alone, rtol=1e-5)


@pytest.mark.parametrize("differs", ["text", "config"])
def test_processes_that_differ_do_not_train_together(text, differs):
    folders = (text / "one", text / ("two" if differs == "text" else "one"))
    each = command(text, "--mesh.simulate", "4", "--data.path", "*.txt")
    done = over_two(each, [*each, "--train.seed", "1"] if differs == "config" else each, folders=folders)
    assert [status for *_, status in done] == [2, 2], done
    assert f"process 0 has another {differs} than process 1: start all" in done[0][1]
    assert not (text / "runs").exists()


def test_processes_join_into_one_mesh():
    code = """
import jax, numpy as np
from ringattn import config, mesh
ring = mesh.start(config.Mesh(simulate=2))
rows = mesh.place(np.arange(8, dtype=np.int32)[None], ring, mesh.TOKENS)
with jax.set_mesh(ring):
    print(jax.process_count(), ring.shape["context"], int(jax.jit(lambda x: x.sum())(rows)), flush=True)
"""
    for said, errors, _ in over_two(*[[sys.executable, "-c", code]] * 2):
        assert "2 4 28\n" in said, errors
