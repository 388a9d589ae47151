"""What a file holds: one text, or many documents (JSONL, Parquet, FASTA), read one after another, never all at once."""

import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

FASTA = (".fa", ".fasta", ".fna", ".ffn")
JSONL = (".jsonl", ".ndjson")
"""These, as FASTA, plain or gzip."""
VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
"""Files of a folder or a glob that are taken for video; a file that is named may be called anything."""

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty member that ends a file written by bgzip, whose first member has the same subfield BC."""

_CUT = "ends in the middle of its gzip data: it was cut off, so get it again"
_KEYS = 'a string under "text", or strings under "prompt" and "completion"'


class Document(NamedTuple):
    name: str
    """Where it was read: a path, with the line's number for JSONL, the row's for Parquet, the record for FASTA."""
    content: bytes
    """Text (as a rule UTF-8), bases in capitals, or a video file as it is."""
    prompt: int = 0
    """How many bytes at its beginning are given: they are read, but not learned."""
    read: int = 0
    """How many bytes of the file were read for it."""

    @property
    def kind(self) -> str:
        """What it is one of: its file's ending ('.py') or, where a file holds many documents, its file's name."""
        file = Path(re.sub(r"(?<=\w)(:\d+|: record .*)$", "", self.name))
        return file.name if reader(file) else file.suffix or file.parent.name

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the content."""
        return hashlib.sha256(self.content).digest()


def reader(file: Path) -> Callable[[Path], Iterator[Document]] | None:
    """What reads the documents of a file of that name; None if the file is taken for plain text."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    if suffixes and suffixes[-1] in FASTA:
        return read_fasta
    if suffixes and suffixes[-1] in JSONL:
        return read_jsonl
    return read_parquet if file.suffix.lower() == ".parquet" else None


@contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, plain or gzip, and the file as it lies; ValueError if its gzip data are not whole."""
    packed = file.suffix.lower() == ".gz"
    try:
        with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) if packed else raw as content:
            if packed:
                _check_end(raw)
            yield content, raw  # pyright: ignore[reportReturnType]
    except EOFError as error:
        raise ValueError(f"{file} {_CUT}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is not good gzip data ({error}): get it again") from error


def _check_end(raw: IO[bytes]) -> None:
    """Raises EOFError if bgzip wrote the file, and its last member is not there: a cut between members is no error."""
    begin = raw.read(16)
    if begin[:4] == BGZF_END[:4] and begin[12:14] == b"BC":
        raw.seek(0, 2)
        raw.seek(max(raw.tell() - len(BGZF_END), 0))
        if raw.read() != BGZF_END:
            raise EOFError
    raw.seek(0)


def read_jsonl(file: Path) -> Iterator[Document]:
    """A document a line, plain or gzip. Raises ValueError that names file and line."""
    with _opened(file) as (lines, raw):
        before = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _from_json(f"{file}:{number}", line, raw.tell() - before)
                before = raw.tell()


def _from_json(name: str, line: bytes, read: int) -> Document:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise TypeError(f"it is a {type(record).__name__}")
        return _from_record(name, record, read)
    # Not JSON, no such key, not a string, half a surrogate pair, or nested without end.
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        cure = f"each line must be a JSON object with {_KEYS}"
        raise ValueError(f"{name}: {type(error).__name__}: {error}: {cure}") from error


def _from_record(name: str, record: dict[str, Any], read: int) -> Document:
    if "text" in record and ("prompt" in record or "completion" in record):
        raise KeyError("both text and prompt or completion")
    parts = [record["text"]] if "text" in record else [record["prompt"], record["completion"]]
    if "prompt" not in record and "completion" in record:
        raise KeyError("prompt")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"{part!r:.40} is no string")
    *prompt, text = (part.encode("utf-8") for part in parts)
    return Document(name, b"".join([*prompt, text]), sum(map(len, prompt)), read)


def read_parquet(file: Path) -> Iterator[Document]:
    """A document a row, under the columns that JSONL has as keys; some hundred rows are in memory at a time.

    Raises ValueError if pyarrow is missing, if the file is no Parquet or lacks the columns, or for a row without text.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"{file} needs the library pyarrow: pip install 'ringattn[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as rows:
            columns = [name for name in ("text", "prompt", "completion") if name in rows.schema_arrow.names]
            if columns not in (["text"], ["prompt", "completion"]):
                found = ", ".join(rows.schema_arrow.names)
                raise ValueError(f"{file} has the columns {found}: it must have {_KEYS}")
            number, read = 0, file.stat().st_size // max(rows.metadata.num_rows, 1)
            for batch in rows.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield _from_row(f"{file}:{number}", record, read)
                    number += 1
    except arrow.ArrowException as error:
        raise ValueError(f"{file} is no Parquet file that can be read ({error}): write it again") from error
    except OSError as error:  # pyarrow says so of damaged pages, too
        raise ValueError(f"{file} cannot be read ({error}): check its permissions, or write it again") from error


def _from_row(name: str, record: dict[str, Any], read: int) -> Document:
    try:
        return _from_record(name, record, read)
    except TypeError as error:
        raise ValueError(f"{name}: {error}: each row must have {_KEYS}") from error


def read_fasta(file: Path) -> Iterator[Document]:
    """A document a record of a FASTA file, plain or gzip: its bases in capitals, without the ends of lines.

    Raises ValueError that names the file, and the record, if a record has no bases, if the file does not begin with
    a record's header, or if its gzip data are damaged or end too early.
    """
    with _opened(file) as (lines, raw):
        yield from _records(file, lines, raw)


def _records(file: Path, lines: Iterable[bytes], raw: IO[bytes]) -> Iterator[Document]:
    name, parts, begin = "", [], 0

    def record() -> Document:
        if not any(parts):
            raise ValueError(f"{name} has no sequence: add its bases, or remove the record")
        return Document(name, b"".join(parts).upper(), read=raw.tell() - begin)

    for number, line in enumerate(lines, start=1):
        if line.startswith(b">"):
            if name:
                yield record()
                begin = raw.tell()
            title = line[1:].split()
            name = f"{file}: record {title[0].decode(errors='replace') if title else f'of line {number}'}"
            parts = []
        elif name:
            parts.append(line.strip())
        elif line.strip():
            raise ValueError(f"{file}: line {number} comes before any header, so it is no FASTA: begin with '>name'")
    if not name:
        raise ValueError(f"{file} holds no record: a FASTA file has '>name' and, below it, the bases")
    yield record()
