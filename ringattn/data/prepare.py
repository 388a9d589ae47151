"""Writes token shards from what data.path names, with a progress bar."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ringattn.config import Data
from ringattn.data.corpus import encode
from ringattn.data.reading import find_tokenizer
from ringattn.data.shards import are_shards, open_shards, write_shards
from ringattn.data.sources import read_documents, size_of

_EVERY = 5.0  # seconds between the lines where there is no terminal


class Bar:
    """A live bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int | None):
        self._console = Console(highlight=False, soft_wrap=True)
        columns = (BarColumn(), DownloadColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._live.add_task("", total=total)
        self._total, self._read, self._tokens = total, 0, 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> "Bar":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def add(self, read: int, tokens: int) -> None:
        """So many bytes more were read, and tokens written."""
        self._read, self._tokens = self._read + read, self._tokens + tokens
        self._live.update(self._task, completed=self._read, description=self._speed())
        if not self._console.is_terminal and time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            share = "" if not self._total else f" of {self._total / 1e6:,.1f}"
            self.say(f"{self._read / 1e6:,.1f}{share} MB read, {self._speed()}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} a second"

    def result(self) -> str:
        return f"{self._read / 1e6:,.1f} MB read, {self._speed()}"


def prepare(data: Data, output: str) -> None:
    """Writes shards of all that `data.path` names to the new folder `output`; says so if they are there already.

    Raises ValueError if `output` holds something else, if the data cannot be read, or if it cannot write.
    """
    if isinstance(data.path, tuple):
        each = "write each to a folder of its own, and train with --data.path FOLDER FOLDER"
        raise ValueError(f"data.path={data.path} names several: {each}")
    folder = Path(output).expanduser()
    if not folder.name:
        raise ValueError(f"--output {output!r} must name a folder to be written, such as --output shards")
    if are_shards(data.path):
        raise ValueError(f"data.path={data.path!r} holds shards already: give it to scripts/train.py as it is")
    if folder.exists():
        _check_same(folder, data)
        print(f"nothing to do: {folder} is there already, and whole")
        return
    source = Path(data.path).expanduser().resolve()
    if source.is_dir() and folder.resolve().is_relative_to(source):
        where = f"--output {folder} lies inside data.path={data.path!r}, whose text it would become"
        raise ValueError(f"{where}: choose a folder beside it")
    tokenizer = find_tokenizer(data)
    video = tokenizer.name == "video"
    with Bar(size_of(data.path, video)) as bar:
        write_shards(folder, encode(read_documents(data.path, video), tokenizer), tokenizer, data, bar.add)
        bar.say(f"{folder}: {bar.result()}")


def _check_same(folder: Path, data: Data) -> None:
    cure = "choose another --output, or remove it"
    if not are_shards(str(folder)):
        raise ValueError(f"--output {folder} is there already, and holds no shards: {cure}")
    shards = open_shards(folder)
    if shards.path != data.path:
        raise ValueError(f"--output {folder} holds shards of {shards.path!r}: {cure}")
    shards.check(find_tokenizer(data, [shards]), data)
    now = [document.digest for document in read_documents(shards.path, video=shards.tokenizer == "video")]
    if now != shards.digests():
        raise ValueError(f"{data.path!r} is not what {folder} was made from, it was changed since: {cure}")
