"""metrics.jsonl: one JSON object per logged step."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ringattn.runs.files import write_text, writing

Row = dict[str, Any]
"""An object of metrics.jsonl: `step` and named values, None if unknown."""


MAX_ROW = 2**20
"""Maximum number of bytes of a line."""


class MetricsFile:
    """Appends rows to metrics.jsonl, from process 0 only, each with one write.

    Rows that cannot be written, for example because the disk is full, stay in memory and are tried again.
    """

    def __init__(self, path: Path, after: int, report: Callable[[str], None] = print):
        """Opens `path` to continue after step `after`. Removes the rows of later steps, which will be repeated.

        `report` takes a line about rows that cannot be written. Raises ValueError if the file cannot be opened.
        """
        kept = [row for row in read_rows(path) if row["step"] <= after]
        self._path, self._file, self._report = path, None, report
        self._pending, self._size, self._failing = list[bytes](), 0, False
        self.lost = 0
        """Number of rows that could not be written."""
        if jax.process_index() == 0:
            content = "".join(json.dumps(row) + "\n" for row in kept)
            with writing(path):
                write_text(path, content)
                self._file, self._size = path.open("ab", buffering=0), len(content.encode())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._attempt(self._append)
            self._attempt(self._file.close)
        if self._pending:
            self.lost = len(self._pending)
            self._report(f"{self.lost} rows of metrics were not written to {self._path}")

    def write(self, row: Row) -> None:
        if self._file is not None:
            self._pending.append(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._attempt(self._append)

    def sync(self) -> None:
        """Syncs all rows to disk, so that after a power failure the metrics are as recent as any checkpoint."""
        if self._file is not None:
            file = self._file
            self._attempt(lambda: os.fsync(file.fileno()))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Performs `action` on the file. Reports the first of several errors of the disk."""
        try:
            action()
            self._failing = bool(self._pending)
        except OSError as error:
            if not self._failing:
                problem = f"metrics cannot be written to {self._path} ({error.strerror})"
                self._report(f"{problem}; training continues, and later rows are tried with these; free disk space")
            self._failing = True

    def _append(self) -> None:
        """Writes the pending rows. Raises OSError, perhaps after a part of a row, which the next call removes."""
        assert self._file is not None
        while self._pending:
            line = self._pending[0]
            if os.fstat(self._file.fileno()).st_size > self._size:
                self._file.truncate(self._size)  # a part of a row that failed
            if self._file.write(line) < len(line):  # a full disk takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(line)
            self._pending.pop(0)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a metrics.jsonl; [] if the file is missing. Skips an incomplete last line.

    Raises ValueError if any other line is not a JSON object of numbers with a step.
    """
    if not path.is_file():
        return []
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW), b""), 1):
            try:
                if line.endswith(b"\n"):
                    rows.append(_row(line))
                elif len(line) == MAX_ROW:
                    raise ValueError(f"it has more than {MAX_ROW:,} bytes")
            except (ValueError, RecursionError) as error:
                problem = f"line {number} of {path} is not a row of metrics ({error})"
                raise ValueError(f"{problem}; repair or remove the line, or use another --name") from None
    return rows


def _row(line: bytes) -> Row:
    """Returns the row of a line. Raises ValueError if a value is not a number of float64, or None."""
    row = json.loads(line)
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError("it has no step")
    for name, value in row.items():
        is_number = isinstance(value, int | float) and not abs(value) > sys.float_info.max
        if not (type(value) is int and is_number if name in ("step", "stage") else is_number or value is None):
            raise ValueError(f"{name}={value!r:.80} must be a number")
    return row


def stage_ends(rows: list[Row]) -> list[int]:
    """Returns the last step of each stage except the last. Each stage ends with a validation, which has a row."""
    last = {row["stage"]: row["step"] for row in rows if "stage" in row}
    return [step for _, step in sorted(last.items())][:-1]
