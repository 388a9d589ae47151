"""Reads files that come from outside: names are checked to be names, JSON to be an object without duplicate keys."""

import json
from pathlib import Path
from typing import Any

from ringattn.config.files import distinct
from ringattn.units import first_line

MAX_JSON_BYTES = 100 * 2**20
"""Maximum size of a JSON file or header. The largest tokenizer.json files take 35 MB."""


def file_inside(directory: Path, name: object) -> Path | None:
    """Returns the path of the regular file `name` in `directory`; None if it does not exist.

    A symbolic link may lead to another file in `directory`, or to `../../blobs`, where Hugging Face's cache stores the
    content. Raises ValueError if `name` is not a plain file name, or if a link leads elsewhere.
    """
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", "..") and len(name) < 256
    if not isinstance(name, str) or not plain or "\\" in name or "\0" in name:
        rule = "must be a plain file name, without a directory; download the model again from a source that you trust"
        raise ValueError(f"{directory}: {shortened(name)} {rule}")
    path = directory / name
    try:
        if not path.is_file():  # also False for a directory, a pipe or a device
            return None
        allowed = {directory.resolve(), (directory / "../../blobs").resolve()}
        if path.is_symlink() and path.resolve().parent not in allowed:
            fix = "replace the link by the file that it leads to"
            raise ValueError(f"{path} is a symbolic link to {path.resolve()}, outside its directory; {fix}")
    except OSError:  # such as a name that is too long
        return None
    return path


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file at `path`. Raises ValueError that names the file and the problem."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MAX_JSON_BYTES:,}")
        return parse_object(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a valid JSON object ({first_line(error)}); download it again") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """Returns the JSON object in `content`. Raises ValueError, also for duplicate keys, NaN and infinity."""
    try:
        value = json.loads(content, object_pairs_hook=distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def shortened(value: object) -> str:
    """Returns the repr of a value for messages, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Returns text from a file for messages, at most 120 characters, without line breaks and control characters."""
    short = text if len(text) <= 120 else f"{text[:117]}..."
    return "".join(each if each.isprintable() else "?" for each in short)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
