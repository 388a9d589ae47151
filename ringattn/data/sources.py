"""Where data comes from: a file, a folder, a glob, or Python's own standard library. A document is a name and bytes."""

import glob
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ringattn.data.formats import VIDEO, Document, reader

STDLIB = "stdlib"
# Tests say little that is new; pydoc_data holds the topics, which are documents of their own; lib2to3 is gone in 3.13.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"})

_log = logging.getLogger(__name__)


def read_documents(path: str, video: bool = False) -> Iterator[Document]:
    """The documents of `path`, in an order that depends on their names alone; empty ones are left out.

    `path` is a file, a folder (with all that lies below it but hidden names and linked folders), a glob (`**`
    spans folders; files only), or 'stdlib' (a folder of that name is './stdlib'). What .jsonl, .parquet and FASTA
    files hold is said in `formats`; any other file is one document. Of a folder or a glob, files that are not text
    (with `video`: not called like a video) are counted in a warning of the log.

    Raises ValueError, some of it only once the documents are read: if there is no such path, if it cannot be read, if
    a named file is not text, if a document is bad (names it), or if nothing is left.
    """
    found = False
    try:
        for document in _standard_library() if path == STDLIB and not video else _read(path, video):
            if document.content:
                found = True
                yield document
    except OSError as error:
        place = f" {error.filename!r}" if error.filename is not None else ""
        cure = "check its permissions, or name other text"
        raise ValueError(f"data.path={path!r}: cannot read{place} ({error.strerror}): {cure}") from error
    if not found:
        raise ValueError(f"data.path={path!r} holds no {_kind(video)}: name a non-empty file, a folder or glob of them")


def size_of(path: str, video: bool = False) -> int | None:
    """How many bytes `read_documents` will read, or None if that is not known beforehand."""
    try:
        return None if path == STDLIB else sum(file.stat().st_size for file in _find(path, video))
    except OSError:
        return None  # it is said where the file is read


def _kind(video: bool) -> str:
    return "video" if video else "text"


def _standard_library() -> Iterator[Document]:
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    for file in _files(root, _NOT_STDLIB):
        if file.suffix == ".py":
            yield _whole(file, f"{STDLIB}/{file.relative_to(root).as_posix()}", file.read_bytes())
    for name, text in sorted(topics.items()):
        yield Document(f"{STDLIB}/topics/{name}", text.encode(), read=len(text))


def _whole(file: Path, name: str, content: bytes) -> Document:
    return Document(name, content, read=len(content))


def _find(path: str, video: bool) -> list[Path]:
    """The files that `path` names, in order, whether or not they can serve."""
    place = Path(os.path.expanduser(path))
    if place.is_file():
        return [place]
    if path and place.is_dir():
        found = _files(place)
    elif any(sign in path for sign in "*?["):
        matches = (Path(match) for match in glob.glob(str(place), recursive=True))
        found = sorted((match for match in matches if not match.is_dir()), key=Path.as_posix)
    else:
        cure = f"name a file, a folder, a glob or {STDLIB!r}; relative paths start at {os.getcwd()}"
        raise ValueError(f"data.path={path!r} is neither a file nor a folder: {cure}")
    if not found:
        raise ValueError(f"data.path={path!r} finds no file: put {_kind(video)} files there, or name other text")
    return found


def _read(path: str, video: bool) -> Iterator[Document]:
    files, skipped = _find(path, video), 0
    named = Path(os.path.expanduser(path)).is_file()
    for file in files:
        if not named and not file.is_file():
            skipped += 1
        elif video:
            if named or file.suffix.lower() in VIDEO:
                yield _whole(file, str(file), file.read_bytes())
            else:
                skipped += 1
        elif (read := reader(file)) is not None:
            yield from read(file)
        elif (content := _text(file)) is not None:
            yield _whole(file, str(file), content)
        elif named:
            cure = "use --data.tokenizer video" if file.suffix.lower() in VIDEO else "convert it to UTF-8"
            raise ValueError(f"data.path={path!r} holds NUL bytes, so it is not plain text: {cure}")
        else:
            skipped += 1
    if skipped:
        kind = "video" if video else "plain text"
        _log.warning("data.path=%r: skipped %d of %d files that are not %s", path, skipped, len(files), kind)


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
