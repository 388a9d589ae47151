"""Sources of documents: a file, a directory, a glob, or Python's standard library."""

import glob
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ringattn.data.formats import VIDEO, Document, reader_for
from ringattn.units import bytes_in_words

STDLIB = "stdlib"
# Excludes tests, which are repetitive; pydoc_data, whose topics are added as documents; lib2to3, absent in Python 3.13.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"})

_log = logging.getLogger(__name__)


def read_documents(path: str, video: bool = False) -> Iterator[Document]:
    """Yields the non-empty documents of `path`, in an order that depends only on their names.

    `path` is a file, a directory (read recursively, without hidden names and symbolic links to directories), a glob
    (`**` spans directories; matches files only), or 'stdlib' (use './stdlib' for a directory of that name). JSONL,
    Parquet and FASTA files contain many documents, see `formats`; any other file is one document. In a directory or a
    glob, files that are not text (with `video`: files without a video suffix) are skipped with a warning.

    Raises ValueError, possibly during iteration, if `path` does not exist or cannot be read, if it is a file that is
    not text, if a document is invalid, or if all documents are empty.
    """
    empty = True
    try:
        for document in _standard_library() if path == STDLIB and not video else _read(path, video):
            if document.content:
                empty = False
                yield document
    except OSError as error:
        file = f" {error.filename!r}" if error.filename is not None else ""
        fix = "check its permissions, or use another path"
        raise ValueError(f"data.path={path!r}: cannot read{file} ({error.strerror}); {fix}") from error
    if empty:
        kind = "video" if video else "text"
        raise ValueError(
            f"data.path={path!r} has no {kind}; use a non-empty file, or a directory or glob that contains one"
        )


def total_bytes(path: str, video: bool = False) -> int | None:
    """Returns the number of bytes that `read_documents` reads, or None if unknown."""
    try:
        return None if path == STDLIB else sum(file.stat().st_size for file in _find(path, video))
    except OSError:
        return None  # read_documents reports the error


def _standard_library() -> Iterator[Document]:
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    for file in _files(root, _NOT_STDLIB):
        if file.suffix == ".py":
            yield _document(f"{STDLIB}/{file.relative_to(root).as_posix()}", file.read_bytes())
    for name, text in sorted(topics.items()):
        yield _document(f"{STDLIB}/topics/{name}", text.encode())


def _document(name: str, content: bytes) -> Document:
    return Document(name, content, bytes_read=len(content))


def _find(path: str, video: bool) -> list[Path]:
    """Returns the files of `path` in order, of any type."""
    location = Path(os.path.expanduser(path))
    if location.is_file():
        return [location]
    if path and location.is_dir():
        files = _files(location)
    elif any(char in path for char in "*?["):
        matches = (Path(match) for match in glob.glob(str(location), recursive=True))
        files = sorted((match for match in matches if not match.is_dir()), key=Path.as_posix)
    else:
        fix = f"use a file, a directory, a glob or {STDLIB!r} (relative paths start at {os.getcwd()})"
        raise ValueError(f"data.path={path!r} is neither a file nor a directory; {fix}")
    if not files:
        kind = "video" if video else "text"
        raise ValueError(f"data.path={path!r} matches no file; add {kind} files, or use another path")
    return files


def _read(path: str, video: bool) -> Iterator[Document]:
    files, skipped = _find(path, video), 0
    single = Path(os.path.expanduser(path)).is_file()
    for file in files:
        if not single and not file.is_file():
            skipped += 1
            continue
        if reader_for(file) is None or video:
            _check_memory(file)
        if video:
            if single or file.suffix.lower() in VIDEO:
                yield _document(str(file), file.read_bytes())
            else:
                skipped += 1
        elif (read := reader_for(file)) is not None:
            yield from read(file)
        elif (content := _text(file)) is not None:
            yield _document(str(file), content)
        elif single:
            fix = "use --data.tokenizer video" if file.suffix.lower() in VIDEO else "convert it to UTF-8"
            raise ValueError(f"data.path={path!r} contains NUL bytes, so it is not plain text; {fix}")
        else:
            skipped += 1
    if skipped:
        kind = "video" if video else "plain text"
        _log.warning("data.path=%r: skipped %d of %d files that are not %s", path, skipped, len(files), kind)


def _files(directory: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    """Returns all files below `directory`, sorted, without hidden names and `excluded` directories."""
    files = []
    for root, directories, names in os.walk(directory, onerror=_raise):
        directories[:] = [name for name in directories if not name.startswith(".") and name not in excluded]
        # os.walk does not follow linked directories, which can form cycles. Listed as files, they count as skipped.
        linked = [name for name in directories if os.path.islink(os.path.join(root, name))]
        files += [Path(root, name) for name in names + linked if not name.startswith(".")]
    return sorted(files, key=Path.as_posix)


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_memory(file: Path) -> None:
    """Raises ValueError if a file that is one document is larger than the memory of this machine."""
    size, memory = file.stat().st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        problem = f"{file} is one document of {bytes_in_words(size)}, but this machine has {bytes_in_words(memory)}"
        raise ValueError(f"{problem} of memory; split it, or write it as JSONL with a document per line")


def _text(file: Path) -> bytes | None:
    """Returns the content of the file, or None if it is not text. Reads only the first 8 KiB of most binary files."""
    with file.open("rb") as stream:
        start = stream.read(8192)
        content = start if b"\0" in start else start + stream.read()
    return None if b"\0" in content else content
