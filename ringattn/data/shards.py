"""Tokens in files: written once, checked when opened, then mapped into memory, never loaded as a whole.

A folder holds index.json (what the shards are, with the length and the SHA-256 of every other file), shard-00000.bin
and so on (tokens, little-endian, end to end as in a Corpus), documents.npy (each document's length, given targets
and digest), and what the tokenizer needs. Shards end anywhere, also within a document.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ringattn.config import Data
from ringattn.data.corpus import Corpus, Encoded, ShardedTokens
from ringattn.data.tokenizer import Tokenizer
from ringattn.data.video import as_npy, read_npy

FORMAT = "ringattn shards 1"
SHARD_TOKENS = 2**27
_DOCUMENT = np.dtype([("length", "<i8"), ("given", "<i8"), ("digest", "u1", (32,))])
_TYPES = {"uint8": "u1", "uint16": "<u2", "int32": "<i4"}
_PIECE = 2**24  # bytes that are hashed at a time
_LARGE = 2**30  # bytes from which it is said that they are checked

Told = Callable[[int, int], None]
"""Is told how many bytes were read, and how many tokens written, since it was last told."""


@dataclass(frozen=True)
class Shards:
    """An opened folder of shards, whose files are whole."""

    folder: Path
    tokenizer: str
    """The tokenizer's name."""
    fingerprint: str
    """The tokenizer's fingerprint."""
    size: int
    """Ids that it has; all tokens are below."""
    validation: float | None
    """The share that was held out when the codebook was learned; None if nothing was learned."""
    path: str
    """The data.path they were made from."""
    tokens: ShardedTokens
    documents: np.ndarray
    """[documents] of _DOCUMENT."""

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        lengths = self.documents["length"].astype(np.int64)
        contexts = self.documents["given"].astype(np.int64)
        return Corpus(self.tokens, np.cumsum(lengths) - lengths, lengths, contexts, tokenizer.unlearned)

    def digests(self) -> list[bytes]:
        return [digest.tobytes() for digest in self.documents["digest"]]

    def check(self, tokenizer: Tokenizer, data: Data) -> None:
        """Raises ValueError unless the shards are those that `tokenizer` makes."""
        if self.fingerprint == tokenizer.fingerprint and self.size != tokenizer.size:
            raise ValueError(f"{self.folder} is said to hold {self.size} ids of {tokenizer.size}: {_CURE}")
        if self.fingerprint != tokenizer.fingerprint:
            same = "another one of that kind: name the file that they were made with"
            other = f"{self.tokenizer!r}: use --data.tokenizer {self.tokenizer}"
            found = same if self.tokenizer == tokenizer.name else other
            raise ValueError(f"data.tokenizer={data.tokenizer!r}, but {self.folder} holds tokens of {found}")
        if self.validation not in (None, data.validation):
            cure = f"use --data.validation {self.validation}, or write the shards anew"
            raise ValueError(
                f"data.validation={data.validation}, but the codebook of {self.folder} was learned "
                f"with {self.validation} held out: {cure}"
            )


def are_shards(path: str) -> bool:
    """Whether `path` is a folder of shards, whole or not."""
    folder = Path(path).expanduser()
    try:
        if any((folder / name).is_file() for name in ("documents.npy", "shard-00000.bin")):
            return True
        return (folder / "index.json").is_file() and FORMAT.encode() in (folder / "index.json").read_bytes()[:200]
    except OSError:
        return False  # it is said where it is read as text


def write_shards(
    folder: Path,
    encoded: Iterable[Encoded],
    tokenizer: Tokenizer,
    data: Data,
    told: Told,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Writes the documents to `folder`, which must not exist; it is there entirely or not at all.

    Raises ValueError as reading the documents does, and if it cannot write.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error
    try:
        unfinished.chmod(0o755)
        writer = _Writer(unfinished, shard_tokens)
        for document in encoded:
            writer.add(document)
            told(document.read, document.tokens.size)
        writer.finish(tokenizer, data)
        os.rename(unfinished, folder)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Writer:
    def __init__(self, folder: Path, shard_tokens: int):
        self._folder, self._shard_tokens = folder, shard_tokens
        self._files: list[dict[str, Any]] = []
        self._documents: list[tuple[int, int, bytes]] = []
        self._pending: list[np.ndarray] = []
        self._type, self._held = np.dtype(np.uint8), 0

    def add(self, document: Encoded) -> None:
        self._type = document.tokens.dtype
        self._documents.append((document.tokens.size, document.context, document.digest))
        self._pending.append(document.tokens)
        self._held += document.tokens.size
        if self._held > self._shard_tokens:
            whole = np.concatenate(self._pending)
            begins = range(0, self._held, self._shard_tokens)
            for begin in begins[:-1]:
                self._shard(whole[begin : begin + self._shard_tokens])
            self._pending = [whole[begins[-1] :]]
            self._held -= begins[-1]

    def _shard(self, tokens: np.ndarray) -> None:
        name = f"shard-{sum(file['name'].startswith('shard') for file in self._files):05}.bin"
        self._write(name, tokens.astype(_TYPES[tokens.dtype.name]).tobytes(), tokens=tokens.size)

    def _write(self, name: str, content: bytes, **more: int) -> None:
        with (self._folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        entry = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._files.append(entry | more)

    def finish(self, tokenizer: Tokenizer, data: Data) -> None:
        self._shard(np.concatenate([*self._pending, np.array([tokenizer.boundary], self._type)]))
        documents = np.zeros(len(self._documents), _DOCUMENT)
        for name, values in zip(("length", "given"), list(zip(*self._documents, strict=True))[:2], strict=True):
            documents[name] = values
        joined = b"".join(digest for _, _, digest in self._documents)
        documents["digest"] = np.frombuffer(joined, np.uint8).reshape(-1, 32)
        self._write("documents.npy", as_npy(documents))
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
        (self._folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def open_shards(folder: Path) -> Shards:
    """Opens what `write_shards` wrote, after it has read all of it to compare lengths and SHA-256.

    Raises ValueError that names the file which is missing, was changed or cut off, or says what it must not.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
        kind, sizes = np.dtype(_TYPES[index["dtype"]]), int(index["tokenizer"]["size"])
        name, fingerprint = str(index["tokenizer"]["name"]), str(index["tokenizer"]["fingerprint"])
        validation = None if index["validation"] is None else float(index["validation"])
        files, made_from = list(map(_entry, index["files"])), str(index["path"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is no index of shards ({type(error).__name__}: {error}): {_CURE}") from error
    _verify(folder, files)
    shards = []
    for file in files:
        if "tokens" in file:
            tokens = None
            if file["bytes"] == file["tokens"] * kind.itemsize > 0:
                tokens = np.memmap(folder / file["name"], kind, "r")
            if tokens is None or tokens.max() >= sizes or tokens.min() < 0:
                raise ValueError(f"{folder / file['name']} holds other tokens than {path} says: {_CURE}")
            shards.append(tokens)
    documents = read_npy(folder / "documents.npy")
    listed = {file["name"] for file in files} >= {"documents.npy"} and documents.dtype == _DOCUMENT
    if not listed or documents.ndim != 1 or not shards or not _fit(documents, sum(part.size for part in shards)):
        raise ValueError(f"{folder / 'documents.npy'} does not go with the shards beside it: {_CURE}")
    joined = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
    return Shards(folder, name, fingerprint, sizes, validation, made_from, ShardedTokens(shards, joined), documents)


_CURE = "remove the folder and write it anew by scripts/prepare.py"


def _entry(file: Any) -> dict[str, Any]:
    if not re.fullmatch(r"[\w-]+\.\w+", file["name"]):  # a name, not a path
        raise ValueError(f"{file['name']!r} is no name of a file")
    counts = {name: int(file[name]) for name in ("bytes", "tokens") if name in file}
    if not all(0 <= count < 2**63 for count in counts.values()):
        raise ValueError(f"{file['name']!r} is said to have {counts}")
    return {"name": str(file["name"]), "sha256": str(file["sha256"]), "bytes": 0} | counts


def _verify(folder: Path, files: list[dict[str, Any]]) -> None:
    """Reads all files, with a bar on a terminal if there is much to read."""
    total, console = sum(file["bytes"] for file in files), Console(highlight=False, soft_wrap=True)
    if total >= _LARGE:
        console.print(f"checking {total / 1e9:,.1f} GB of shards in {folder}", markup=False)
    with Progress(console=console, transient=True, disable=total < _LARGE or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for file in files:
            path, digest = folder / file["name"], hashlib.sha256()
            try:
                if path.stat().st_size != file["bytes"]:
                    raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {file['bytes']}: {_CURE}")
                with path.open("rb") as stream:
                    while piece := stream.read(_PIECE):
                        digest.update(piece)
                        bar.advance(task, len(piece))
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error.strerror}): put it back, or {_CURE}") from error
            if digest.hexdigest() != file["sha256"]:
                raise ValueError(f"{path} was changed since it was written: put it back, or {_CURE}")


def _fit(documents: np.ndarray, tokens: int) -> bool:
    lengths, contexts = documents["length"], documents["given"]
    inside = np.all((lengths >= 1) & (lengths <= tokens) & (contexts >= 0) & (contexts < lengths))
    return bool(documents.size and inside and sum(map(int, lengths)) == tokens - 1)
