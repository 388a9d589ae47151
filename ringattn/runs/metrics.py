"""metrics.jsonl: one JSON object per logged step."""

import json
import os
from pathlib import Path
from typing import Any

import jax

from ringattn.runs.files import write_text

Row = dict[str, Any]
"""An object of metrics.jsonl: `step` and named values, None if unknown."""


class MetricsFile:
    """Appends rows to metrics.jsonl, from process 0 only, and flushes each row."""

    def __init__(self, path: Path, after: int):
        """Opens `path` to continue after step `after`. Removes the rows of later steps, which will be repeated."""
        kept = [row for row in read_rows(path) if row["step"] <= after]
        self._file = None
        if jax.process_index() == 0:
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Syncs all rows to disk, so that after a power failure the metrics are as recent as any checkpoint."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a metrics.jsonl; [] if the file is missing. Skips an incomplete last line.

    Raises ValueError if any other line is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} has a line that is not JSON ({error}); repair or remove it, or use another --name"
        ) from None


def stage_ends(rows: list[Row]) -> list[int]:
    """Returns the last step of each stage except the last. Each stage ends with a validation, which has a row."""
    last = {row["stage"]: row["step"] for row in rows}
    return [step for _, step in sorted(last.items())][:-1]
