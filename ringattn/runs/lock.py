"""File locks, so that two processes never write to the same output directory.

The operating system releases the lock of a process that ends or is killed. An unlocked lock file has no effect.
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ATTEMPTS, INTERVAL = 5, 0.1
"""Number of attempts, and seconds between them: `check_free` briefly holds a lock."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held = set[int]()  # descriptors of lock files


@contextmanager
def locked(file: Path, directory: Path, fix: str, unwritable_fix: str) -> Iterator[None]:
    """Holds a lock on `file` inside the context, so that only this process writes to `directory`.

    Creates the file and missing directories, and removes them at the end, except directories that are not empty. On a
    file system without locks, it prints a warning and continues.

    Raises:
      ValueError: if another process, or another call in this one, holds the lock; the message names the process
        and proposes `fix`. Also if the file cannot be written; the message proposes `unwritable_fix`.
    """
    created = [parent for parent in file.parents if not parent.exists()]
    try:
        descriptor = _acquire(file)
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror}); {unwritable_fix}") from None
    if descriptor is None:
        raise _refusal(file, directory, fix)
    try:
        yield
    finally:
        _release(descriptor, file, created)


def check_free(file: Path, directory: Path, fix: str) -> None:
    """Raises the error of `locked` if a process holds the lock on `file` at this moment. Writes nothing."""
    with suppress(OSError):  # a missing file is free, and `locked` reports other errors
        descriptor = os.open(file, os.O_RDONLY)
        try:
            free = _lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)
        if not free:
            raise _refusal(file, directory, fix)


def _acquire(file: Path) -> int | None:
    """Returns the descriptor of the locked file; None if another process holds the lock. Raises OSError."""
    for attempt in range(ATTEMPTS):
        time.sleep(INTERVAL if attempt else 0)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # an exiting process has just removed the directory
            if attempt == ATTEMPTS - 1:
                raise
            continue
        _held.add(descriptor)
        try:
            # The process that held the lock may have removed the file after it was opened here.
            if _lock(descriptor, fcntl.LOCK_EX) and _is_same(descriptor, file):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, _describe_this_process(), 0)
                return descriptor
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                rule = "a second start of the same command would not be detected"
                print(f"warning: {file.parent} has no file locks ({error.strerror}): {rule}", file=sys.stderr)
                return descriptor
            _close(descriptor)
            raise
        _close(descriptor)
    return None


def _lock(descriptor: int, kind: int) -> bool:
    """Returns False if another process holds the lock. Raises OSError if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _is_same(descriptor: int, file: Path) -> bool:
    """Returns True if `file` is still the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _release(descriptor: int, file: Path, created: list[Path]) -> None:
    if descriptor not in _held:  # in a forked child, which does not hold the lock of its parent
        return
    with suppress(OSError):  # removes the file while locked; a process that has opened it detects this by `_is_same`
        if _is_same(descriptor, file):
            file.unlink()
    _close(descriptor)
    with suppress(OSError):  # a directory that is not empty
        for parent in created:
            parent.rmdir()


def _close(descriptor: int) -> None:
    _held.remove(descriptor)
    os.close(descriptor)


def _forget_locks() -> None:
    while _held:
        os.close(_held.pop())


# Otherwise a forked child would hold the lock until it exits, even after its parent is killed.
os.register_at_fork(after_in_child=_forget_locks)


def _describe_this_process() -> bytes:
    command = " ".join(sys.argv[:1] + [shlex.quote(word) for word in sys.argv[1:]])
    content = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time(), "command": command}
    return json.dumps(content).encode()


def _refusal(file: Path, directory: Path, fix: str) -> ValueError:
    return ValueError(f"{directory} is in use by {_holder(file)}: wait for it, stop it, or {fix}")


def _holder(file: Path) -> str:
    """Describes the process that wrote the lock file. Retries, because the file can be briefly incomplete."""
    for attempt in range(ATTEMPTS):
        time.sleep(INTERVAL if attempt else 0)
        with suppress(OSError, ValueError, LookupError, TypeError, OverflowError):
            content = json.loads(file.read_bytes())
            started = time.strftime("%Y-%m-%d %H:%M", time.localtime(content["started"]))
            host, command = (
                textwrap.shorten(str(content[name]), 120, placeholder=" ...") for name in ("host", "command")
            )
            return f"process {int(content['pid'])} on host {host}, started {started} ({command})"
    return "another process"
