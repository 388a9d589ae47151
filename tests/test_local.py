"""The launcher of several processes on this machine, with small programs in the place of a training script."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_multiprocess import environ

from ringattn import config
from ringattn.runs import local

RECORD = """
import os, pathlib, signal, sys
names = ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
index = os.environ.get("JAX_PROCESS_ID", "0")
directory = pathlib.Path(sys.argv[1])
start = len(list(directory.glob(f"{index}-*")))
(directory / f"{index}-{start}").write_text(" ".join(os.environ.get(name, "-") for name in names))
"""


def config_of(**mesh: Any) -> config.Config:
    c = config.Config(name="x", data=config.Data(path="x", seq_len=64), train=config.Train(batch_size=8))
    return replace(c, mesh=config.Mesh(**mesh), model=config.Model(dim=96, heads=12, kv_heads=12))


def run(directory: Path, program: str, c: config.Config | None = None, **options: Any) -> int:
    words = [sys.executable, "-c", RECORD + program, str(directory)]
    return local.launch(config_of(simulate=2) if c is None else c, local.Options(**options), words)


def starts(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(directory.iterdir())}


def test_processes_get_their_places_and_prefixes(tmp_path, capfd):
    program = "print('out', index, flush=True); print('err', index, file=sys.stderr, flush=True)"
    assert run(tmp_path, program, processes=3) == 0
    assert starts(tmp_path) == {f"{index}-0": f"3 {index}" for index in range(3)}
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["[1] err 1", "[2] err 2", "err 0"]


def test_a_run_starts_again_after_a_failure_until_it_is_complete(tmp_path, capfd):
    assert run(tmp_path, "sys.exit([3, 1, 0][start])", restarts=5) == 0
    assert starts(tmp_path) == {f"0-{start}": "- -" for start in range(3)}
    assert capfd.readouterr().err.splitlines() == [
        "restart 1 of 5 after status 3: 1 process",
        "restart 2 of 5 after status 1: 1 process",
    ]


@pytest.mark.parametrize(("status", "restarts", "number"), [(2, 3, 1), (0, 3, 1), (4, 1, 2), (3, 0, 1)])
def test_a_run_does_not_start_again_after_an_error_of_the_config(tmp_path, status, restarts, number):
    assert run(tmp_path, f"sys.exit({status})", restarts=restarts) == status
    assert len(starts(tmp_path)) == number


def test_a_killed_process_is_left_out_once(tmp_path, capfd):
    """Eight devices, then 3 * 2 do not divide the rows of 64 tokens, so 2 * 2, then 8 again."""
    program = """
if start == 0 and index == "3":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3 if start < 2 and index == "0" else 0)
"""
    assert run(tmp_path, program, processes=4, restarts=2) == 0
    found = starts(tmp_path)
    assert {name: count.split()[0] for name, count in found.items() if name[0] == "0"} == {
        "0-0": "4",
        "0-1": "2",
        "0-2": "4",
    }
    assert capfd.readouterr().err.splitlines() == [
        "process 3 was killed by SIGKILL",
        "restart 1 of 2 after status 137: 2 processes",
        "restart 2 of 2 after status 3: 4 processes",
    ]


@pytest.mark.parametrize(
    ("mesh", "most", "expected"),
    [
        ({"context": -1}, 3, 2),  # rows of 64 tokens do not divide by 6
        ({"context": 8}, 3, 4),  # 8 devices are required
        ({"context": 2, "data": -1}, 3, 2),  # a batch of 8 rows does not divide by 3
        ({"context": -1, "auto": True}, 3, 3),
        ({"context": -1}, 0, 4),  # none is left
    ],
)
def test_the_next_start_has_as_many_processes_as_fit(mesh, most, expected):
    assert local.largest(config_of(simulate=2, **mesh), most, 4) == expected


@pytest.mark.parametrize(
    ("codes", "status"),
    [([0, 0], 0), ([3, 2], 2), ([3, -9, 3], 137), ([3, 4], 4), ([3, 1], 1), ([143, 143], 143), ([0, 3], 3)],
)
def test_the_status_is_that_of_the_cause(codes, status):
    assert local.most_informative(codes) == status


@pytest.mark.parametrize(
    ("options", "simulate", "message"),
    [
        ({"processes": 0}, 2, "--processes 0 must be at least 1"),
        ({"restarts": -1}, 2, "--restarts -1 must be at least 0"),
        ({"processes": 2}, 0, "--processes 2 needs simulated devices; use --simulate N"),
    ],
)
def test_a_mistake_in_the_options(tmp_path, options, simulate, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "", config_of(simulate=simulate), **options)
    assert not starts(tmp_path)


def test_processes_within_a_run_of_several_processes_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(ValueError, match="--processes 2 in a process of a run of several; leave out --processes"):
        run(tmp_path, "", processes=2)


def test_processes_that_outlive_a_failure_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "STRAGGLERS", 0.5)
    program = "import time; time.sleep(1000) if index == '1' else sys.exit(3)"
    assert run(tmp_path, program, processes=2) == 3


LAUNCH = """
import sys
from ringattn.runs import signals
signals.end_on_signals()
sys.path.insert(0, "tests")
from test_local import config_of, local
words = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
sys.exit(local.launch(config_of(simulate=2), local.Options(processes=2, restarts=2), words))
"""
STOPPABLE = """
from ringattn.runs import local, signals
import time
signals.end_on_signals()
local.end_with_launcher()
(directory / f"{index}-{start}").rename(directory / f"ready-{index}")
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_signals_of_the_launcher_reach_its_processes(tmp_path, number):
    """SIGINT is passed on, and the run does not start again. If the launcher is killed, its processes stop."""
    words = [sys.executable, "-c", LAUNCH, str(tmp_path), RECORD + STOPPABLE]
    with subprocess.Popen(words, env=environ(), stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as p:
        while p.poll() is None and {path.name for path in tmp_path.iterdir()} != {"ready-0", "ready-1"}:
            time.sleep(0.02)
        os.kill(p.pid, number)
        _, err = p.communicate(timeout=60)  # at the end of all processes that write to stderr
    name = "SIGINT" if number == signal.SIGINT else "SIGTERM"
    assert p.returncode == (130 if number == signal.SIGINT else -9)
    expected = {f"stopped by {name}", f"[1] stopped by {name}"}
    assert set(err.splitlines()) == (expected if number == signal.SIGINT else {f"stopped by {name}"})
