"""Atomic writes: readers find either the complete new file or the old one."""

import io
import json
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


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


def write_figure(path: Path, figure: Figure) -> None:
    """Writes `figure` as a PNG, like `write_bytes`. Creates the parent directory."""
    path.parent.mkdir(exist_ok=True)
    png = io.BytesIO()
    figure.savefig(png, dpi=150)
    write_bytes(path, png.getvalue())
