"""The end of one process ends the others, with a sentence that names it."""

import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_multiprocess import environ
from test_rendezvous import free_address

from ringattn.mesh import peers, rendezvous
from ringattn.mesh.launchers import Place
from ringattn.planning.estimate import Machine

PROGRAM = """
import sys, time
import jax
from ringattn import config
from ringattn.mesh import peers
from ringattn.mesh.devices import join
from ringattn.mesh.processes import gather
from ringattn.runs import signals

signals.end_on_signals()
join(config.Mesh(simulate=1))
with config.reported_errors(), peers.announced_errors():
    with signals.before_ending(peers.announce_stop, immediately=True):
        gather("compiled")
        print("ready", flush=True)
        {work}
"""
COLLECTIVES = "while True: gather('') and time.sleep(0.02)"


def started(count: int, work: str) -> list[subprocess.Popen[str]]:
    """Starts processes that do `work` after a collective, and waits until all are ready."""
    joined = environ() | {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-c", PROGRAM.format(work=work)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=joined | {"JAX_PROCESS_ID": str(n)}, **pipes) for n in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert any("ready" in line for line in process.stdout)
    return processes


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Returns exit status and stderr of each process. Raises TimeoutExpired after a minute."""
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def sentence(process: subprocess.Popen[str], index: int, reason: str) -> str:
    member = f"process {index} on host {socket.gethostname()} (pid {process.pid})"
    return f"{member} {reason}; run the same command again to resume\n"


@pytest.mark.parametrize(("count", "victim"), [(2, 0), (3, 1)])
def test_a_killed_process_ends_the_others_with_a_sentence(count, victim):
    """Without the relay, the end of process 0 aborts the others; without the connections, they hang or raise errors."""
    processes = started(count, COLLECTIVES)
    processes[victim].kill()
    expected = sentence(processes[victim], victim, "ended unexpectedly")
    assert ends(processes) == [(-9, "") if index == victim else (3, expected) for index in range(count)]


def test_a_process_in_a_sleep_ends_when_another_is_stopped_or_fails():
    """The main thread of process 0 does not communicate; process 1 is stopped by a signal, or raises an error."""
    processes = started(2, "time.sleep(1000)")
    processes[1].send_signal(signal.SIGTERM)
    expected = sentence(processes[1], 1, "was stopped by a signal")
    assert ends(processes) == [(3, expected), (143, "stopped by SIGTERM\n")]
    failing = "if jax.process_index(): raise ValueError('a disk is full')\n        time.sleep(1000)"
    processes = started(2, failing)
    expected = sentence(processes[1], 1, "ended with an error")
    assert ends(processes) == [(3, expected), (2, "error: a disk is full\n")]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (ValueError("UNKNOWN files cannot be read"), False),
        (ValueError("train.seed=-1 must be at least 0"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_of_communication_are_recognized(error, expected):
    assert peers._is_of_communication(error) == expected
    wrapped = ValueError("cannot write")
    wrapped.__cause__ = error
    assert peers._is_of_communication(wrapped) == expected


def test_processes_of_one_host_are_recognized(monkeypatch):
    """With one process per GPU, a host has several processes. Absent devices have one process per host."""
    devices = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", process_index=index) for index in range(4)]
    assert Machine.of(devices).devices_per_host == 1
    meeting = rendezvous.Meeting(["", "", "", ""], ["a", "a", "b", "b"], {})
    monkeypatch.setattr(peers, "_peers", peers._Peers(Place("a:1", 4, 0), meeting))
    assert Machine.of(devices).devices_per_host == 2


def test_a_process_alone_has_no_peers():
    with pytest.raises(ValueError, match="x"), peers.announced_errors():
        raise ValueError("x")
    peers.announce_stop()
