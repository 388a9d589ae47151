"""Training in two processes, each with half of the devices, as on two hosts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST_COMPILATION

from ringattn.runs.lock import locked

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
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_COMPILATION}


def explicit(port, count, index):
    places = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return places | {"JAX_PROCESS_ID": str(index)}


def slurm(port, count, index):
    """The environment of a task of srun on this host."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(count)}
    step |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
    return step | {"JAX_COORDINATOR_PORT": str(port)}


def open_mpi(port, count, index):
    """The environment of a process of mpirun, as of Open MPI 5.0.11."""
    size, rank = str(count), str(index)
    own = {"OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_LOCAL_SIZE": size, "OMPI_COMM_WORLD_RANK": rank}
    own |= {"OMPI_COMM_WORLD_LOCAL_RANK": rank, "PMIX_NAMESPACE": "prterun-localhost-32051@1"}
    return own | {"JAX_COORDINATOR_PORT": str(port)}


def run_processes(*commands, directories=None, launcher=explicit):
    """Runs commands, each in its directory, as one job. Returns (stdout, stderr, exit status) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port, count = free.getsockname()[1], len(commands)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(each, env=environ() | launcher(port, count, index), cwd=directory, **pipes)
        for index, (each, directory) in enumerate(zip(commands, directories or [None] * count, strict=True))
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


@pytest.mark.parametrize("differs", ["data", "config"])
def test_processes_with_different_data_or_config_do_not_train_together(text, differs):
    directories = (text / "one", text / ("two" if differs == "data" else "one"))
    each = command(text, "--mesh.simulate", "4", "--data.path", "*.txt")
    other = [*each, "--train.seed", "1"] if differs == "config" else each
    done = run_processes(each, other, directories=directories)
    assert [status for *_, status in done] == [2, 2], done
    assert f"{differs} of process 0 differs from that of process 1; start all" in done[0][1]
    assert not (text / "runs").exists()


def one_line(stderr):
    """The error of a process, without what JAX's coordinator logs."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert (len(lines), "Traceback" in stderr) == (1, False), stderr
    return lines[0]


def test_processes_without_a_shared_directory_are_refused_at_the_start(text):
    directories = (text / "one", text / "two")
    relative = command(text, "--data.path", str(text / "one"), "--mesh.simulate", "4")
    relative[relative.index("--log.directory") + 1] = "runs"
    done = run_processes(relative, relative, directories=directories)
    assert [status for *_, status in done] == [2, 2], done
    host = socket.gethostname()
    problem = f"error: runs/quickstart of process 0 on host {host} is not visible to process 1 on host {host}"
    fix = "use a --log.directory on a file system that all hosts share"
    assert [one_line(stderr) for _, stderr, _ in done] == [f"{problem}; {fix}"] * 2
    assert not any("parameters" in stdout for stdout, *_ in done)  # printed before the step is compiled
    assert not list(text.glob("*/runs"))


def test_a_second_start_of_two_processes_does_not_join(text):
    """A second launch that joined at the same address would abort the first."""
    run = text / "runs" / "quickstart"
    both = command(text, "--data.path", str(text / "one"), "--mesh.simulate", "4")
    with locked(run / ".lock", run, "", ""):
        done = run_processes(both, both)
        assert [path.name for path in run.iterdir()] == [".lock"]
    assert [status for *_, status in done] == [2, 2], done
    in_use = f"error: {run} is in use by process {os.getpid()} on host "
    assert all(one_line(stderr).startswith(in_use) for _, stderr, _ in done)
    assert not any("[Gloo]" in stdout + stderr for stdout, stderr, _ in done)


def test_processes_agree_on_locks_and_checkpoints(tmp_path):
    """Processes that have joined are refused together."""
    code = f"""
import time
from pathlib import Path
import jax
from ringattn import config
from ringattn.mesh.devices import join
from ringattn.runs import shared
shared.PATIENCE, directory = 0.2, Path({str(tmp_path)!r})
join(config.Mesh(simulate=1))

def attempt(action):
    try:
        print(action(), flush=True)
    except ValueError as error:
        print(error, flush=True)

def claim(name):
    with shared.claimed([directory / name], config.Mesh(simulate=1), "fix", "unwritable"):
        shared.check_shared(directory / name)
        return f"claimed {{name}}"

attempt(lambda: claim("free"))
while jax.process_index() and not (directory / "free" / ".lock").exists():
    time.sleep(0.01)  # process 0 holds the lock when process 1 calls
attempt(lambda: claim("free"))
attempt(lambda: claim("held"))
own = directory / str(jax.process_index())
(own / "checkpoints" / "4").mkdir(parents=True)
attempt(lambda: shared.newest_step(own))
if jax.process_index():
    (own / "checkpoints" / "4").rmdir()
attempt(lambda: shared.newest_step(own))
"""
    with locked(tmp_path / "held" / ".lock", tmp_path / "held", "", ""):
        done = run_processes(*[[sys.executable, "-c", code]] * 2)
    host = socket.gethostname()
    for index, (stdout, stderr, status) in enumerate(done):
        assert status == 0, stderr
        free, again, held, same, different = [line for line in stdout.splitlines() if "[Gloo]" not in line]
        assert (free, again, same) == ("claimed free", "claimed free", "4")
        assert held.startswith(f"{tmp_path / 'held'} is in use by process {os.getpid()} on host ")
        assert different == (
            f"the newest checkpoint in {tmp_path / str(index)} is 4 for process 0 on host {host}, 0 for process 1 on "
            f"host {host}; use a --log.directory on a file system that all hosts share"
        )
    assert not (tmp_path / "free").exists()


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_join_into_one_mesh(launcher):
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
    for stdout, stderr, _ in run_processes(*[[sys.executable, "-c", code]] * 2, launcher=launcher):
        assert "2 4 28\n" in stdout, stderr


@pytest.mark.parametrize("axes", [{"data": 1, "context": 4}, {"data": 4, "context": 1}])
def test_a_process_reads_only_the_tokens_of_its_devices(axes):
    code = f"""
import jax, numpy as np
from ringattn import config
from ringattn.data import Corpus, Loader
from ringattn.data.placement import needed_tokens, place_batch
from ringattn.mesh.devices import start

class Recorded(np.ndarray):
    count = 0
    def __getitem__(self, indices):
        if isinstance(indices, np.ndarray):
            Recorded.count += indices.size
        return super().__getitem__(indices)

mesh = start(config.Mesh(simulate=2, **{axes}))
tokens = np.arange(20_001, dtype=np.int32).view(Recorded)
starts = np.array([0, 70, 8000])
corpora = [Corpus(tokens, starts, np.diff(starts, append=20_000), np.zeros(3, int)) for _ in range(2)]
loader = Loader(corpora, 64, 8, 0, mixture=(2.0, 1.0))
needed = needed_tokens((8, 64), mesh, "zigzag", 2)
for step in range(57, 61):  # an epoch of the first corpus ends
    full, counts = place_batch(loader.batch(step), mesh, "zigzag", 2), [Recorded.count]
    part = place_batch(loader.batch(step, needed), mesh, "zigzag", 2)
    counts.append(Recorded.count)
    for x, y in zip(full, part, strict=True):
        for one, other in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    print("read", step, (counts[1] - counts[0]), flush=True)
"""
    for stdout, stderr, _ in run_processes(*[[sys.executable, "-c", code]] * 2):
        lines = [line for line in stdout.splitlines() if line.startswith("read")]
        assert lines == [f"read {step} 512" for step in range(57, 61)], stderr  # 256 tokens and their targets
