"""metrics.jsonl: one JSON object per logged step."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import jax

from ringattn.runs.files import write_text, writing

Row = dict[str, Any]
"""An object of metrics.jsonl: `step` and named values, None if unknown."""


class MetricsFile:
    """Appends rows to metrics.jsonl, from process 0 only, each with one write.

    Raises ValueError if the file cannot be written, for example because the disk is full.
    """

    def __init__(self, path: Path, after: int):
        """Opens `path` to continue after step `after`. Removes the rows of later steps, which will be repeated."""
        kept = [row for row in read_rows(path) if row["step"] <= after]
        self._path, self._file = path, None
        if jax.process_index() == 0:
            with writing(path):
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
                self._file = path.open("ab", buffering=0)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        if self._file is not None:
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
            with writing(self._path):
                if self._file.write(line) < len(line):  # a full disk takes a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Syncs all rows to disk, so that after a power failure the metrics are as recent as any checkpoint."""
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a metrics.jsonl; [] if the file is missing. Skips an incomplete last line.

    Raises ValueError if any other line is not a JSON object with a step.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                rows.append(json.loads(line))
                if not (isinstance(rows[-1], dict) and isinstance(rows[-1].get("step"), int)):
                    raise ValueError("it has no step")
            except ValueError as error:
                problem = f"line {number} of {path} is not a row of metrics ({error})"
                raise ValueError(f"{problem}; repair or remove the line, or use another --name") from None
    return rows


def stage_ends(rows: list[Row]) -> list[int]:
    """Returns the last step of each stage except the last. Each stage ends with a validation, which has a row."""
    last = {row["stage"]: row["step"] for row in rows}
    return [step for _, step in sorted(last.items())][:-1]
