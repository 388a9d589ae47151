"""Atomic writes: readers find either the complete new file or the old one, also after a power failure."""

import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ringattn.runs.signals import before_ending

MAX_SMALL = 2**28
"""Maximum number of bytes of `read_small`. The largest tokenizer.json files take 35 MB."""


def expanded(path: str | Path) -> Path:
    """Returns `path` with the home directory for a leading ~ or ~user; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def read_small(path: Path) -> bytes:
    """Returns the content of a file that describes others. Raises OSError, and ValueError if it could fill memory."""
    check_regular(path)
    size = path.stat().st_size
    if size > MAX_SMALL:
        raise ValueError(f"{path} has {size:,} bytes, more than {MAX_SMALL:,}: it is damaged, or another file")
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Raises ValueError for a pipe or a device: to open or read it could take forever. Raises OSError."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is a pipe or a device, not a regular file")


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of the file at `path`. If the process is killed, the old file remains. Raises OSError."""
    temporary_path = _temporary(path)
    try:
        temporary_path.write_bytes(content)
        with temporary_path.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure after the rename could leave an empty file
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Returns the path of the file that `write_bytes` writes before it replaces `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def check_writable(path: Path, name: str) -> None:
    """Raises ValueError, with a fix, if `write_bytes` cannot write `path`. `name` is the option that gives the path."""
    directory = path.parent
    try:
        if not directory.exists():
            raise ValueError(f"{name} {path}: directory {directory} does not exist; create it first")
        if not directory.is_dir():
            raise ValueError(f"{name} {path}: {directory} is a file; use a path in a directory")
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise ValueError(f"{name} {path} is {kind}; use a file name, such as {path / 'new.json'}")
        _temporary(path).touch()
        _temporary(path).unlink()
    except OSError as error:
        raise ValueError(f"{name} {path}: cannot write to {directory} ({error.strerror}); use another") from None


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, like `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, like `write_bytes`. NaN and infinity are written as NaN and Infinity."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_figure(path: Path, figure: Figure) -> None:
    """Writes `figure` as a PNG, like `write_bytes`. Creates the parent directory."""
    path.parent.mkdir(exist_ok=True)
    png = io.BytesIO()
    figure.savefig(png, dpi=150)
    write_bytes(path, png.getvalue())


def cannot_write(path: Path, reason: str) -> ValueError:
    """Returns the error for a file or directory of a run that cannot be written."""
    fix = "free disk space or make it writable and run the same command again, or use another --log.directory"
    return ValueError(f"cannot write to {path} ({reason}); {fix}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `cannot_write(path, ...)` in place of an OSError, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error.strerror or str(error)) from None


@contextmanager
def complete_directory(directory: Path, fix: str) -> Iterator[Path]:
    """Yields a temporary directory, which becomes `directory` at the end of the context.

    If the context raises an exception or a signal ends the script, nothing remains. `directory` must not exist or be
    empty. An OSError in the context becomes a ValueError with `fix`.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror}); {fix}") from error
    try:
        with before_ending(lambda: shutil.rmtree(temporary, ignore_errors=True)):
            temporary.chmod(0o755)
            yield temporary
            os.rename(temporary, directory)
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror}); {fix}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
