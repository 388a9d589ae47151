"""Atomic writes: readers find either the complete new file or the old one."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of the file at `path`. If the process is killed, the old file remains. Raises OSError."""
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary_path.write_bytes(content)
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, like `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, like `write_bytes`. NaN and infinity are written as NaN and Infinity."""
    write_text(path, json.dumps(content, indent=2) + "\n")
