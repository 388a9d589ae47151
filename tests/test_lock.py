"""Locks on output directories: exclusive, described in the error, released when the process ends."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from ringattn.runs import lock
from ringattn.runs.lock import check_free, locked

FIX = "use another --name"


def hold(directory):
    return locked(directory / ".lock", directory, FIX, "use another --log.directory")


def check(directory):
    check_free(directory / ".lock", directory, FIX)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(lock, "INTERVAL", 0.001)


def test_a_second_start_is_refused_by_name(tmp_path, monkeypatch):
    """A file opened twice in one process has two locks, as in two processes."""
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--name", "a\nb"])
    directory = tmp_path / "runs" / "small"
    check(directory)
    assert list(tmp_path.iterdir()) == []
    with hold(directory):
        written = (directory / ".lock").read_bytes()
        assert json.loads(written)["started"] == pytest.approx(time.time(), abs=3600)
        for attempt in (hold, lambda directory: nullcontext(check(directory))):
            with pytest.raises(ValueError, match="is in use") as refused, attempt(directory):
                pass
            started = r"started \d{4}-\d\d-\d\d \d\d:\d\d"
            process = (
                rf"process {os.getpid()} on host {socket.gethostname()}, {started} \(scripts/train.py --name 'a b'\)"
            )
            assert refused.match(rf"^{directory} is in use by {process}: wait for it, stop it, or {FIX}$")
            assert (directory / ".lock").read_bytes() == written
    assert list(tmp_path.iterdir()) == []  # everything that it created
    with hold(directory):
        (directory / "metrics.jsonl").touch()
    assert list(directory.iterdir()) == [directory / "metrics.jsonl"]


def test_a_file_left_behind_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "long", "started": 0, "command": "gone" * 99}))
    check(tmp_path)
    with hold(tmp_path), pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on"):
        check(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"pid": 1', b'{"pid": 1, "host": "a", "started": 1e99, "command": ""}']
)
def test_a_lock_without_a_readable_name(tmp_path, content):
    with hold(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(ValueError, match=r"is in use by another process: wait"), hold(tmp_path):
            pass


def test_a_file_removed_before_it_is_locked_is_opened_again(tmp_path, monkeypatch):
    """As if the process that held the lock ended between opening and locking, and a third one started."""
    take, calls = lock._lock, []

    def late(descriptor, kind):
        if not calls:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()
        calls.append(descriptor)
        return take(descriptor, kind)

    monkeypatch.setattr(lock, "_lock", late)
    with hold(tmp_path), pytest.raises(ValueError, match=r"is in use by process"):
        check(tmp_path)
    assert len(calls) == 3


def test_an_instant_of_a_check_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    descriptor = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: seconds and fcntl.flock(descriptor, fcntl.LOCK_UN))
    with hold(tmp_path):
        pass
    os.close(descriptor)


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, reason):
    def fail(descriptor, kind):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", fail)
    if reason == errno.EIO:
        with (
            pytest.raises(ValueError, match=r"cannot write to .* \(Input/output error\); use another --log"),
            hold(tmp_path),
        ):
            pass
        return
    check(tmp_path)
    with hold(tmp_path), hold(tmp_path):
        pass
    warning = f"warning: {tmp_path} has no file locks ({os.strerror(reason)}): a second start of the same command"
    assert [line.startswith(warning) for line in capsys.readouterr().err.splitlines()] == [True, True]
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory():
    with pytest.raises(ValueError, match=r"cannot write to /proc/none .*; use another --log.directory"):
        hold(lock.Path("/proc/none")).__enter__()


def test_death_releases_the_lock_at_once(tmp_path):
    """Neither a program that the process started nor a copy of it by fork keeps the lock alive."""
    code = f"""
import os, subprocess, sys, time
from pathlib import Path
from ringattn.runs.lock import locked
directory = Path({str(tmp_path)!r})
with locked(directory / ".lock", directory, "", ""):
    program = subprocess.Popen(["sleep", "100"], close_fds=False)
    reader, writer = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.write(writer, b"1")  # after the functions that os.fork calls in the child
        time.sleep(100)
    os.read(reader, 1)
    print(program.pid, copy, flush=True)
    time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    others = [int(word) for word in process.stdout.readline().split()]
    try:
        with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on host"):
            check(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".lock").is_file()
        with hold(tmp_path):
            pass
        for each in others:
            os.kill(each, 0)  # still alive
    finally:
        process.stdout.close()
        for each in others:
            os.kill(each, signal.SIGKILL)
