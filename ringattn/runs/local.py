"""Starts a script in several processes on this machine, as on several hosts, and starts it again after failures."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import IO

from ringattn import config
from ringattn.mesh.devices import check_sizes, resolve
from ringattn.mesh.launchers import ADDRESS, COUNT, INDEX, find_place
from ringattn.mesh.peers import STATUS as PEER_ENDED
from ringattn.runs.signals import Stop, before_ending, stopped_by_signal

LAUNCHER = "RINGATTN_LAUNCHER"
"""Variable of a started process: the descriptor of a pipe that closes when the launcher ends."""
STRAGGLERS = 60.0
"""Seconds until processes are killed after another one has failed: they end by themselves within seconds."""
FINAL = (0, 2)
"""Exit statuses after which a new start would not help: complete, or an error of config or data."""


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    processes: int | None = None
    """Start this number of processes on this machine, each with mesh.simulate devices. Default: 1."""
    simulate: int | None = None
    """Short form of --mesh.simulate."""
    restarts: int | None = None
    """Start the run again after failures, at most this number of times: after exit status 1, 3 or 4, or if a signal
    ended a process. Default: 0."""

    @property
    def launches(self) -> bool:
        """True if this process starts others; False in the processes that it has started."""
        return (self.processes is not None or self.restarts is not None) and LAUNCHER not in os.environ


def simulated(c: config.Config, options: Options) -> config.Config:
    """Returns `c` with the number of simulated devices of --simulate."""
    return c if options.simulate is None else replace(c, mesh=replace(c.mesh, simulate=options.simulate))


def end_with_launcher() -> None:
    """Makes this process stop, as by SIGTERM, when the launcher that started it is killed."""
    if descriptor := os.environ.pop(LAUNCHER, ""):
        threading.Thread(target=_follow, args=(int(descriptor),), name="launcher", daemon=True).start()


def _follow(descriptor: int) -> None:
    os.read(descriptor, 1)  # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)


def launch(c: config.Config, options: Options, words: Sequence[str]) -> int:
    """Runs `words`, the command of this script, in the processes of `options`. Returns their most informative status.

    Passes SIGINT and SIGTERM on; a second signal kills the processes. If processes were killed and `c` fits fewer
    devices, the next start has fewer processes, and the start after that all of them again.

    Raises ValueError if the options are invalid.
    """
    processes, restarts = 1 if options.processes is None else options.processes, options.restarts or 0
    for name, value, least in (("processes", processes, 1), ("restarts", restarts, 0)):
        if value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    if processes > 1 and c.mesh.simulate == 0:
        raise ValueError(f"--processes {processes} needs simulated devices; use --simulate N, the number per process")
    if processes > 1 and find_place(os.environ) is not None:
        raise ValueError(f"--processes {processes} in a process of a run of several; leave out --processes")
    count = processes
    with stopped_by_signal(lambda line: None) as stop:
        stop.arm()
        for start in range(restarts + 1):
            codes = _run(words, count, stop)
            status = most_informative(codes)
            if status in FINAL or stop.number or start == restarts:
                return status
            killed = sum(code < 0 for code in codes)
            count = processes if count < processes else largest(c, processes - killed, processes)
            for index, code in enumerate(codes):
                if code < 0:
                    print(f"process {index} was killed by {signal.Signals(-code).name}", file=sys.stderr)
            plural = "es" * (count > 1)
            print(f"restart {start + 1} of {restarts} after status {status}: {count} process{plural}", file=sys.stderr)
            time.sleep(1)
    raise AssertionError("a loop of at least one turn")


def largest(c: config.Config, most: int, otherwise: int) -> int:
    """Returns the largest number of processes, at most `most`, whose devices fit all stages of `c`."""
    return next((count for count in range(most, 0, -1) if _fits(c, count)), otherwise)


def _fits(c: config.Config, count: int) -> bool:
    try:
        for number in range(1, len(c.stages) + 1):
            stage = c.stage(number)
            if not stage.mesh.auto:
                check_sizes(stage, resolve(stage.mesh, count * max(1, stage.mesh.simulate)))
    except ValueError:
        return False
    return True


def most_informative(codes: Sequence[int]) -> int:
    """Returns the exit status that tells most about the failure of processes with exit statuses `codes`."""

    def rank(status: int) -> int:
        order = [2, 4, 128, 1, 3, 0]
        return order.index(128 if status not in order or status > 128 else status)

    return min((128 - code if code < 0 else code for code in codes), key=rank)


def _run(words: Sequence[str], count: int, stop: Stop) -> list[int]:
    """Runs `count` processes until all have ended. Returns their exit statuses, negative after a signal."""
    variables = _addresses() | {COUNT: str(count)} if count > 1 else {}
    reader, writer = os.pipe()
    children = list[subprocess.Popen[bytes]]()

    def kill() -> None:
        for child in children:
            child.kill()

    with ExitStack() as stack:
        stack.callback(os.close, writer)
        stack.enter_context(before_ending(kill, immediately=True))
        stack.callback(kill)
        for index in range(count):
            own = os.environ | variables | {LAUNCHER: str(reader)} | ({INDEX: str(index)} if count > 1 else {})
            output, errors = (None, None) if index == 0 else (subprocess.DEVNULL, subprocess.PIPE)
            # Ctrl-C in a terminal reaches all processes of a session. Only the launcher must receive it.
            child = subprocess.Popen(
                words, env=own, stdout=output, stderr=errors, start_new_session=True, pass_fds=[reader]
            )
            children.append(child)
            if child.stderr is not None:
                copying = threading.Thread(target=_copy, args=(child.stderr, index), daemon=True)
                copying.start()
                stack.callback(copying.join, timeout=1)  # after the process has ended
        os.close(reader)
        stragglers = _wait(children, stop)
    return [PEER_ENDED if index in stragglers else child.wait() for index, child in enumerate(children)]


def _wait(children: list[subprocess.Popen[bytes]], stop: Stop) -> set[int]:
    """Waits until all children have ended. Passes a signal on, and kills those that outlive a failed one.

    Returns the indices of the children that it has killed.
    """
    passed_on, deadline, killed = False, float("inf"), set[int]()
    while any(child.poll() is None for child in children):
        if stop.number and not passed_on:
            passed_on = True
            for child in children:
                child.send_signal(stop.number)
        if deadline == float("inf") and any(child.returncode for child in children):
            deadline = time.monotonic() + STRAGGLERS
        if time.monotonic() > deadline:
            killed |= {index for index, child in enumerate(children) if child.poll() is None}
            for index in killed:
                children[index].kill()
        time.sleep(0.05)
    return killed


def _copy(stream: IO[bytes], index: int) -> None:
    """Copies the lines of a process's stderr to stderr, with the index of the process."""
    with stream:
        for line in stream:
            os.write(2, b"[%d] " % index + line)


def _addresses() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return {ADDRESS: address, "JAX_COORDINATOR_BIND_ADDRESS": address}
