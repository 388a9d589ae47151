"""File formats: plain text (one document per file); JSONL, Parquet and FASTA (many documents, read one at a time)."""

import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from ringattn.units import first_line

FASTA = (".fa", ".fasta", ".fna", ".ffn")
JSONL = (".jsonl", ".ndjson")
"""Suffixes of JSONL files. JSONL and FASTA files can be compressed, with the additional suffix .gz."""
VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
"""Suffixes of videos in directories and globs. A video passed as a file can have any suffix."""

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty gzip member that ends a file written by bgzip. The first member of such a file has the subfield BC."""

MAX_LINE = 2**30
"""Maximum number of bytes of a line of JSONL and FASTA."""

_RECORD = 'with a string under "text", or strings under "prompt" and "completion"'


class Document(NamedTuple):
    """A document before tokenization."""

    name: str
    """Path of its file, with the line of JSONL, the row of Parquet or the record of FASTA."""
    content: bytes
    """Text (usually UTF-8), bases in upper case, or a video file."""
    prompt: int = 0
    """Number of bytes at the start that form a prompt, which is masked out of the loss."""
    bytes_read: int = 0
    """Number of bytes read from the file for this document."""
    file: Path | None = None
    """The file, if it contains many documents."""

    @property
    def kind(self) -> str:
        """The suffix of its file ('.py'), or the name of a file with many documents. Losses are reported per kind."""
        path = Path(self.name)
        return self.file.name if self.file else path.suffix or path.parent.name

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, 32 bytes."""
        return hashlib.sha256(self.content).digest()


def reader_for(file: Path) -> Callable[[Path], Iterator[Document]] | None:
    """Returns the reader of documents for the file's suffix; None for plain text."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    if suffixes and suffixes[-1] in FASTA:
        return read_fasta
    if suffixes and suffixes[-1] in JSONL:
        return read_jsonl
    return read_parquet if file.suffix.lower() == ".parquet" else None


@contextmanager
def _open(file: Path) -> Iterator[tuple[BufferedIOBase, BufferedReader]]:
    """Opens a plain or gzip file; yields its uncompressed content and the raw file.

    Raises ValueError for corrupt or truncated gzip data.
    """
    compressed = file.suffix.lower() == ".gz"
    try:
        with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) if compressed else raw as content:
            if compressed:
                _check_end(raw)
            yield content, raw
    except EOFError as error:
        raise ValueError(f"{file} has truncated gzip data; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} has corrupt gzip data ({error}); copy or download it again") from error


def _lines(file: Path, content: BufferedIOBase) -> Iterator[bytes]:
    """Yields the lines of a file. Raises ValueError for a line that could fill the memory."""
    while line := content.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"{file} has a line of more than {MAX_LINE:,} bytes; break its lines, or write it again")
        yield line


def _check_end(raw: BufferedReader) -> None:
    """Raises EOFError if a file written by bgzip lacks its last member.

    The gzip module accepts a file that was truncated between two members.
    """
    header = raw.read(16)
    if header[:4] == BGZF_END[:4] and header[12:14] == b"BC":
        raw.seek(0, 2)
        raw.seek(max(raw.tell() - len(BGZF_END), 0))
        if raw.read() != BGZF_END:
            raise EOFError
    raw.seek(0)


def read_jsonl(file: Path) -> Iterator[Document]:
    """Yields a document per line of a plain or gzip file. Raises ValueError with the file and line."""
    with _open(file) as (content, raw):
        previous = 0
        for line_number, line in enumerate(_lines(file, content), start=1):
            if line.strip():
                yield _from_json(file, line_number, line, raw.tell() - previous)
                previous = raw.tell()


def _from_json(file: Path, line_number: int, line: bytes, bytes_read: int) -> Document:
    rule = f"each line must be a JSON object {_RECORD}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}:{line_number}: not valid JSON ({error}); {rule}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}:{line_number}: {record!r:.40} is not an object; {rule}")
    return _from_record(file, line_number, record, bytes_read, rule)


def _from_record(file: Path, index: int, record: dict[str, Any], bytes_read: int, rule: str) -> Document:
    """Returns the document of line or row `index`. Raises ValueError that names it and ends with `rule`."""
    name, pair = f"{file}:{index}", [key for key in ("prompt", "completion") if key in record]
    if "text" in record and pair:
        raise ValueError(f'{name}: "text" and "{pair[0]}" cannot be combined; {rule}')
    texts = []
    for key in ("prompt", "completion") if pair else ("text",):
        if key not in record:
            raise ValueError(f'{name}: "{key}" is missing; {rule}')
        if not isinstance(record[key], str):
            raise ValueError(f'{name}: "{key}" is {record[key]!r:.40}, not a string; {rule}')
        try:
            texts.append(record[key].encode())
        except UnicodeEncodeError as error:  # JSON allows half of a surrogate pair
            raise ValueError(f'{name}: "{key}" is not valid Unicode ({error.reason}); {rule}') from error
    return Document(name, b"".join(texts), sum(map(len, texts[:-1])), bytes_read, file)


def read_parquet(file: Path) -> Iterator[Document]:
    """Yields a document per row. The columns have the names of the JSONL keys. Reads 256 rows at a time.

    Raises ValueError if pyarrow is missing, the file is damaged, columns are missing, or a row has no text.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"{file} requires the package pyarrow; run pip install 'ringattn[parquet]'") from error
    rule = f"each row must be a record {_RECORD}"
    try:
        with parquet.ParquetFile(file) as rows:
            columns = [name for name in ("text", "prompt", "completion") if name in rows.schema_arrow.names]
            if columns not in (["text"], ["prompt", "completion"]):
                raise ValueError(f"{file} has the columns {', '.join(rows.schema_arrow.names)}; {rule}")
            index, bytes_read = 0, file.stat().st_size // max(rows.metadata.num_rows, 1)
            for batch in rows.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield _from_record(file, index, record, bytes_read, rule)
                    index += 1
    except arrow.ArrowException as error:
        raise ValueError(f"{file} is not a readable Parquet file ({first_line(error)}); write it again") from error
    except OSError as error:  # pyarrow also raises OSError for damaged pages
        raise ValueError(
            f"{file} cannot be read ({first_line(error)}); check its permissions, or write it again"
        ) from error


def read_fasta(file: Path) -> Iterator[Document]:
    """Yields a document per record of a plain or gzip FASTA file: bases in upper case, without line breaks.

    Raises ValueError for a record without bases, for a file that does not start with the header of a record, and for
    corrupt or truncated gzip data.
    """
    with _open(file) as (content, raw):
        yield from _records(file, _lines(file, content), raw)


def _records(file: Path, lines: Iterable[bytes], raw: BufferedReader) -> Iterator[Document]:
    name, sequence, start = "", [], 0

    def record() -> Document:
        if not any(sequence):
            raise ValueError(f"{name} has no sequence; add its bases, or remove the record")
        return Document(name, b"".join(sequence).upper(), bytes_read=raw.tell() - start, file=file)

    for line_number, line in enumerate(lines, start=1):
        if line.startswith(b">"):
            if name:
                yield record()
                start = raw.tell()
            title = line[1:].split()
            name = f"{file}: record {title[0].decode(errors='replace') if title else f'at line {line_number}'}"
            sequence = []
        elif name:
            sequence.append(line.strip())
        elif line.strip():
            problem = f"{file}: line {line_number} precedes the first header, so the file is not FASTA"
            raise ValueError(f"{problem}; start each record with a line '>name'")
    if not name:
        raise ValueError(f"{file} has no record; add a line '>name', followed by lines of bases")
    yield record()
