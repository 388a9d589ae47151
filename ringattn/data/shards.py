"""Token shards: files of tokens, written once, verified when opened, then memory-mapped instead of loaded.

A directory of shards contains index.json (metadata, and the length and SHA-256 of every other file), shard-00000.bin
and so on (the tokens of a Corpus, little-endian), documents.npy (the length, masked prefix and digest of each
document), text_bytes.npy (`Corrections` of the tokens) and the files of the tokenizer. A document can span several
shards.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringattn.config import Data
from ringattn.data.corpus import DIGEST, Corpus, Documents, EncodedDocument, ShardedTokens
from ringattn.data.text_bytes import TABLE, Corrections, TextBytes, concatenate, from_table
from ringattn.data.tokenizer import Tokenizer
from ringattn.data.video import as_npy, read_npy
from ringattn.runs.files import complete_directory, expanded, read_small
from ringattn.runs.progress import Display

FORMAT = "ringattn shards 2"
SHARD_TOKENS = 2**27
_DOCUMENT = np.dtype([("length", "<i8"), ("given", "<i8"), ("digest", "u1", (32,))])  # given: masked prefix
_TYPES = {"uint8": "u1", "uint16": "<u2", "int32": "<i4"}
_TABLES = {"documents.npy": _DOCUMENT, "text_bytes.npy": TABLE}
_CHUNK = 2**24  # bytes hashed at a time
_LARGE = 2**30  # bytes; verification of larger shards shows its progress
_FIX = "remove the directory and write it again with scripts/prepare.py"

OnProgress = Callable[[int, int], None]
"""Called with the number of bytes read and of tokens written since the last call."""


@dataclass(frozen=True)
class Shards:
    """An opened and verified directory of shards."""

    directory: Path
    tokenizer: str
    """Name of the tokenizer."""
    fingerprint: str
    """Fingerprint of the tokenizer."""
    size: int
    """Vocabulary size of the tokenizer; all token ids are smaller."""
    validation: float | None
    """Fraction held out when the codebook was learned; None for tokenizers without a codebook."""
    path: str
    """data.path of the source."""
    tokens: ShardedTokens
    documents: np.ndarray
    """[documents], of dtype _DOCUMENT."""
    corrections: Corrections
    """Of the tokens."""

    def read(self, tokenizer: Tokenizer) -> Documents:
        lengths, prefixes = (self.documents[field].astype(np.int64) for field in ("length", "given"))
        text_bytes = TextBytes(tokenizer.byte_lengths, self.corrections)
        starts = np.cumsum(lengths) - lengths
        ids = tokenizer.boundary, tokenizer.start
        corpus = Corpus(self.tokens, starts, lengths, prefixes, tokenizer.ignored_id, text_bytes, *ids)
        kinds = [self.directory.name] * lengths.size
        return Documents(corpus, self.digests, kinds, lambda index: f"document {index + 1} of {self.directory}")

    @property
    def digests(self) -> np.ndarray:
        """[documents], of dtype DIGEST."""
        return np.ascontiguousarray(self.documents["digest"]).view(DIGEST).reshape(-1)

    def check(self, tokenizer: Tokenizer, data: Data) -> None:
        """Raises ValueError unless the shards were written with `tokenizer` and the held-out fraction of `data`."""
        if self.fingerprint == tokenizer.fingerprint and self.size != tokenizer.size:
            sizes = f"lists a vocabulary of {self.size} ids, but its tokenizer has {tokenizer.size}"
            raise ValueError(f"{self.directory / 'index.json'} {sizes}; {_FIX}")
        if self.fingerprint != tokenizer.fingerprint:
            kind, value = repr(self.tokenizer), self.tokenizer
            if self.tokenizer == tokenizer.name:
                kind = f"another tokenizer of kind {kind}"
            if self.tokenizer == "file":
                value = str(self.directory / "tokenizer.json")
            fix = f"use --data.tokenizer {value}"
            if self.tokenizer == tokenizer.name == "video":
                fix = f"use --data.tokenizer {self.directory / 'codebook.npy'} and the data.frame_size of the shards"
            raise ValueError(f"data.tokenizer={data.tokenizer!r}, but {self.directory} has tokens of {kind}; {fix}")
        if self.validation not in (None, data.validation):
            raise ValueError(
                f"data.validation={data.validation} must be {self.validation}, the fraction held out when the codebook "
                f"of {self.directory} was learned; use --data.validation {self.validation}, or write the shards again"
            )


def are_shards(path: str) -> bool:
    """Returns True if `path` is a directory of shards, even if incomplete."""
    directory = expanded(path)
    index = directory / "index.json"
    try:
        if any((directory / name).is_file() for name in ("documents.npy", "shard-00000.bin")):
            return True
        return index.is_file() and FORMAT.encode() in index.read_bytes()[:200]
    except OSError:
        return False  # read_documents reports the error


def write_shards(
    directory: Path,
    encoded: Iterable[EncodedDocument],
    tokenizer: Tokenizer,
    data: Data,
    on_progress: OnProgress,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Writes the documents atomically to `directory`, which must not exist.

    Raises ValueError if a document cannot be read or if writing fails.
    """
    with complete_directory(directory, "choose another --output") as temporary:
        writer = _Writer(temporary, shard_tokens)
        for document in encoded:
            writer.add(document)
            on_progress(document.bytes_read, document.tokens.size)
        writer.finish(tokenizer, data)


class _Writer:
    """Writes each shard when it is full, then documents.npy, the files of the tokenizer and index.json."""

    def __init__(self, directory: Path, shard_tokens: int):
        self._directory, self._shard_tokens = directory, shard_tokens
        self._files: list[dict[str, Any]] = []
        self._documents: list[tuple[int, int, bytes]] = []
        self._corrections: list[Corrections] = []
        self._tokens = 0
        self._pending: list[np.ndarray] = []
        self._type, self._pending_tokens = np.dtype(np.uint8), 0

    def add(self, document: EncodedDocument) -> None:
        self._type = document.tokens.dtype
        self._documents.append((document.tokens.size, document.masked_prefix, document.digest))
        self._corrections.append(document.corrections.shift(self._tokens))
        self._tokens += document.tokens.size
        self._pending.append(document.tokens)
        self._pending_tokens += document.tokens.size
        if self._pending_tokens > self._shard_tokens:
            tokens = np.concatenate(self._pending)
            starts = range(0, tokens.size, self._shard_tokens)
            for start in starts[:-1]:
                self._write_shard(tokens[start : start + self._shard_tokens])
            self._pending = [tokens[starts[-1] :]]
            self._pending_tokens -= starts[-1]

    def _write_shard(self, tokens: np.ndarray) -> None:
        name = f"shard-{sum(file['name'].startswith('shard') for file in self._files):05}.bin"
        self._write(name, tokens.astype(_TYPES[tokens.dtype.name]).tobytes(), tokens=tokens.size)

    def _write(self, name: str, content: bytes, **counts: int) -> None:
        with (self._directory / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        entry = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._files.append(entry | counts)

    def finish(self, tokenizer: Tokenizer, data: Data) -> None:
        self._write_shard(np.concatenate([*self._pending, np.array([tokenizer.boundary], self._type)]))
        documents = np.zeros(len(self._documents), _DOCUMENT)
        for name, values in zip(("length", "given"), list(zip(*self._documents, strict=True))[:2], strict=True):
            documents[name] = values
        joined = b"".join(digest for _, _, digest in self._documents)
        documents["digest"] = np.frombuffer(joined, np.uint8).reshape(-1, 32)
        self._write("documents.npy", as_npy(documents))
        self._write("text_bytes.npy", as_npy(concatenate(self._corrections).table()))
        for name, content in tokenizer.files.items():
            self._write(name, content)
        index = {
            "format": FORMAT,
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "size": tokenizer.size},
            "dtype": self._type.name,
            "validation": data.validation if tokenizer.name == "video" else None,
            "path": data.path,
            "files": self._files,
        }
        (self._directory / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def open_shards(directory: Path) -> Shards:
    """Opens shards written by `write_shards`, after verifying the length and SHA-256 of every file.

    Raises ValueError with the file that is missing, truncated, changed or invalid.
    """
    path = directory / "index.json"
    try:
        index = json.loads(read_small(path))
        if index["format"] != FORMAT:
            raise ValueError(f"format={index['format']!r} must be {FORMAT!r}")
        dtype, size = np.dtype(_TYPES[index["dtype"]]), int(index["tokenizer"]["size"])
        name, fingerprint = str(index["tokenizer"]["name"]), str(index["tokenizer"]["fingerprint"])
        validation = None if index["validation"] is None else float(index["validation"])
        files, data_path = list(map(_entry, index["files"])), str(index["path"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not a valid index ({type(error).__name__}: {error}); {_FIX}") from error
    _verify(directory, files)
    shards = []
    for file in files:
        if "tokens" in file:
            tokens = None
            if file["bytes"] == file["tokens"] * dtype.itemsize > 0:
                tokens = np.memmap(directory / file["name"], dtype, "r")
            if tokens is None or tokens.max() >= size or tokens.min() < 0:
                raise ValueError(f"{directory / file['name']} does not contain the tokens listed in {path}; {_FIX}")
            shards.append(tokens)
    total, listed = sum(shard.size for shard in shards), {file["name"] for file in files}
    documents, table = (_read_table(directory, *table, listed) for table in _TABLES.items())
    if not shards or not _documents_fit(documents, total):
        raise ValueError(f"{directory / 'documents.npy'} does not match the shards; {_FIX}")
    corrections = from_table(table, total)
    if corrections is None:
        raise ValueError(f"{directory / 'text_bytes.npy'} does not match the shards; {_FIX}")
    joined = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
    tokens = ShardedTokens(shards, joined)
    return Shards(directory, name, fingerprint, size, validation, data_path, tokens, documents, corrections)


def _read_table(directory: Path, name: str, dtype: np.dtype, listed: set[str]) -> np.ndarray:
    """Returns the array of a .npy file. Raises ValueError unless the index lists it and it is [n] of `dtype`."""
    table = read_npy(directory / name)
    if name not in listed or table.ndim != 1 or table.dtype != dtype:
        raise ValueError(f"{directory / name} does not match the shards; {_FIX}")
    return table


def _entry(file: Any) -> dict[str, Any]:
    """Returns the validated index entry of a file. Raises exceptions that `open_shards` catches."""
    if not re.fullmatch(r"[\w-]+\.\w+", file["name"]):  # a path could point outside the directory
        raise ValueError(f"{file['name']!r} is not a plain file name")
    counts = {name: int(file[name]) for name in ("bytes", "tokens") if name in file}
    if not all(0 <= count < 2**63 for count in counts.values()):
        raise ValueError(f"{file['name']!r} has counts out of range: {counts}")
    return {"name": str(file["name"]), "sha256": str(file["sha256"]), "bytes": 0} | counts


def _verify(directory: Path, files: list[dict[str, Any]]) -> None:
    """Verifies the length and SHA-256 of all files. Shows progress for large shards."""
    total, done = sum(file["bytes"] for file in files), 0
    large = total >= _LARGE
    with Display(total, in_bytes=True, every_process=True) if large else nullcontext() as display:
        if display:
            display.print(f"verifying {total / 1e9:,.1f} GB of shards in {directory}")
        for file in files:
            path, digest = directory / file["name"], hashlib.sha256()
            for chunk in _chunks(path, file["bytes"]):
                digest.update(chunk)
                done += len(chunk)
                if display:
                    display.update(done)
            if digest.hexdigest() != file["sha256"]:
                raise ValueError(f"{path} has changed since it was written; restore it, or {_FIX}")


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    """Yields the content of a file in chunks. Raises ValueError unless it has `size` bytes."""
    try:
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}; {_FIX}")
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); restore it, or {_FIX}") from error


def _documents_fit(documents: np.ndarray, tokens: int) -> bool:
    """Returns True if the document lengths are valid and sum to `tokens`, including one final boundary."""
    lengths, masked_prefixes = documents["length"], documents["given"]
    valid = np.all((lengths >= 1) & (lengths <= tokens) & (masked_prefixes >= 0) & (masked_prefixes < lengths))
    return bool(documents.size and valid and sum(map(int, lengths)) == tokens - 1)
