"""Tokenizes the documents of data.path and writes token shards, with a progress bar."""

import time
from pathlib import Path

from ringattn.config import Data
from ringattn.data.corpus import encode
from ringattn.data.dataset import find_tokenizer
from ringattn.data.shards import are_shards, open_shards, write_shards
from ringattn.data.sources import read_documents, total_bytes
from ringattn.runs.files import expanded
from ringattn.runs.lock import locked
from ringattn.runs.progress import Display

_INTERVAL = 5.0  # seconds between progress lines if the output is not a terminal


class _Progress:
    """Reports bytes read and tokens written, as a progress bar on a terminal, otherwise as a line every few seconds."""

    def __init__(self, display: Display, total: int | None):
        self._display, self._total = display, total
        self._read, self._tokens = 0, 0
        self._started = self._printed = time.monotonic()

    def add(self, bytes_read: int, tokens: int) -> None:
        self._read, self._tokens = self._read + bytes_read, self._tokens + tokens
        self._display.update(self._read, self._speed())
        if not self._display.is_terminal and time.monotonic() - self._printed > _INTERVAL:
            self._printed = time.monotonic()
            self._display.print(self.summary(self._total))

    def summary(self, total: int | None = None) -> str:
        of_total = f" of {total / 1e6:,.1f}" if total else ""
        return f"{self._read / 1e6:,.1f}{of_total} MB read, {self._speed()}"

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} per second"


def prepare(data: Data, output: str) -> None:
    """Writes shards of the documents of `data.path` to the new directory `output`, or verifies existing shards.

    Raises ValueError if `output` exists with other content, if the data cannot be read, or if writing fails.
    """
    if isinstance(data.path, tuple):
        fix = "write each path to its own directory, and train with --data.path DIRECTORY DIRECTORY"
        raise ValueError(f"data.path={data.path} must be a single path; {fix}")
    directory = expanded(output)
    if not directory.name:
        raise ValueError(f"--output {output!r} must name a directory, such as --output shards")
    if are_shards(data.path):
        raise ValueError(f"data.path={data.path!r} already contains shards; pass it to scripts/train.py")
    if not directory.exists():
        source = expanded(data.path).resolve()
        if source.is_dir() and directory.resolve().is_relative_to(source):
            problem = f"--output {directory} is inside data.path={data.path!r}, which would then contain its own shards"
            raise ValueError(f"{problem}; choose a directory outside it")
        # The lock file is next to the output directory, which is renamed into place once complete.
        file, fix = directory.with_name(f".{directory.name}.lock"), "choose another --output"
        with locked(file, directory, fix, fix):
            if not directory.exists():  # no other process has just written it
                return _write(data, data.path, directory)
    _check_same(directory, data)
    print(f"nothing to do: {directory} already contains these shards, complete and unchanged")


def _write(data: Data, path: str, directory: Path) -> None:
    tokenizer = find_tokenizer(data)
    video = tokenizer.name == "video"
    total = total_bytes(path, video)
    with Display(total, in_bytes=True, every_process=True) as display:
        progress = _Progress(display, total)
        write_shards(directory, encode(read_documents(path, video), tokenizer), tokenizer, data, progress.add)
        display.print(f"{directory}: {progress.summary()}")


def _check_same(directory: Path, data: Data) -> None:
    """Raises ValueError unless `directory` contains the shards that `data` would produce."""
    fix = "choose another --output, or remove the directory"
    if not are_shards(str(directory)):
        raise ValueError(f"--output {directory} exists but contains no shards; {fix}")
    shards = open_shards(directory)
    if shards.path != data.path:
        raise ValueError(f"--output {directory} contains shards of data.path={shards.path!r}; {fix}")
    shards.check(find_tokenizer(data, [shards]), data)
    digests = [document.digest for document in read_documents(shards.path, video=shards.tokenizer == "video")]
    if b"".join(digests) != shards.digests.tobytes():
        raise ValueError(f"data.path={data.path!r} has changed since the shards in {directory} were written; {fix}")
