"""Where text comes from: a file, a folder, a glob, or Python's own standard library. A document is a name and bytes."""

import glob
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

STDLIB = "stdlib"
# Tests say little that is new; pydoc_data holds the topics, which are documents of their own; lib2to3 is gone in 3.13.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"})

_log = logging.getLogger(__name__)


class Document(NamedTuple):
    name: str
    """Where it was read: a path, with the line's number for JSONL."""
    content: bytes
    """Its text, as a rule UTF-8, never empty."""


def read_documents(path: str) -> list[Document]:
    """The documents of `path`, in an order that depends on their names alone; empty ones are left out.

    `path` is a file, a folder (with all that lies below it but hidden names and linked folders), a glob (`**`
    spans folders; files only), or 'stdlib' (a folder of that name is './stdlib'). A .jsonl file holds a document
    a line, under the key "text"; any other file is one document. Files of a folder or a glob that are not text
    are counted in a warning of the log.

    Raises ValueError if there is no such path, if it cannot be read, if a named file is not text, if a line of
    JSONL is bad (names file and line), or if no text is left.
    """
    try:
        documents = _standard_library() if path == STDLIB else _read(path)
    except OSError as error:
        place = f" {error.filename!r}" if error.filename is not None else ""
        cure = "check its permissions, or name other text"
        raise ValueError(f"data.path={path!r}: cannot read{place} ({error.strerror}): {cure}") from error
    documents = [document for document in documents if document.content]
    if not documents:
        raise ValueError(f"data.path={path!r} holds no text: name a non-empty file, a folder or glob of text files")
    return documents


def _standard_library() -> list[Document]:
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    sources = [file for file in _files(root, _NOT_STDLIB) if file.suffix == ".py"]
    named = [Document(f"{STDLIB}/{file.relative_to(root).as_posix()}", file.read_bytes()) for file in sources]
    return named + [Document(f"{STDLIB}/topics/{name}", text.encode()) for name, text in sorted(topics.items())]


def _read(path: str) -> list[Document]:
    place = Path(os.path.expanduser(path))
    if place.is_file():
        content = _text(place)
        if content is None:
            raise ValueError(f"data.path={path!r} holds NUL bytes, so it is not plain text: convert it to UTF-8")
        return list(_documents(place, content))
    if path and place.is_dir():
        found = _files(place)
    elif any(sign in path for sign in "*?["):
        matches = (Path(match) for match in glob.glob(str(place), recursive=True))
        found = sorted((match for match in matches if not match.is_dir()), key=Path.as_posix)
    else:
        cure = f"name a file, a folder, a glob or {STDLIB!r}; relative paths start at {os.getcwd()}"
        raise ValueError(f"data.path={path!r} is neither a file nor a folder: {cure}")
    if not found:
        raise ValueError(f"data.path={path!r} finds no file: put text files there, or name other text")
    return _read_files(path, found)


def _read_files(path: str, files: list[Path]) -> list[Document]:
    documents, skipped = [], 0
    for file in files:
        content = _text(file) if file.is_file() else None
        if content is None:
            skipped += 1
        else:
            documents += _documents(file, content)
    if skipped:
        _log.warning("data.path=%r: skipped %d of %d files that are not plain text", path, skipped, len(files))
    return documents


def _files(folder: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        # A linked folder may lead back here, so it is not entered; it is listed, so that it counts as skipped.
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name) for name in names + linked if not name.startswith(".")]
    return sorted(found, key=Path.as_posix)


def _raise(error: OSError) -> NoReturn:
    raise error


def _text(file: Path) -> bytes | None:
    """The file's content, or None if it is not text; a large binary file is not read to its end."""
    with file.open("rb") as stream:
        start = stream.read(8192)
        content = start if b"\0" in start else start + stream.read()
    return None if b"\0" in content else content


def _documents(file: Path, content: bytes) -> Iterator[Document]:
    if file.suffix.lower() != ".jsonl":
        yield Document(str(file), content)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield Document(f"{file}:{number}", _json_text(f"{file}:{number}", line))


def _json_text(name: str, line: bytes) -> bytes:
    try:
        text = json.loads(line)["text"]
        return text.encode("utf-8")
    # Not JSON, no object, no such key, not a string, half a surrogate pair, or nested without end.
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        cure = 'each line must be a JSON object with a string under "text"'
        raise ValueError(f"{name}: {type(error).__name__}: {error}: {cure}") from error
