"""Finished results of an evaluation, stored so that an interrupted evaluation can resume."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from ringattn.runs.files import read_small
from ringattn.units import first_line

Result = dict[str, Any]
"""Result of one cell: an object of cells.jsonl and results.json. Its names depend on the task."""


def score_name(result: Result) -> str:
    """Returns the name of the score of a retrieval task, its `rate`."""
    return "score of generated answers" if "generated" in result else "exact match"


def _digest(key: str, result: Result) -> str:
    """Returns a hexadecimal digest of a line. JSON restores numbers and the order of names exactly."""
    return hashlib.sha256(json.dumps([key, result]).encode()).hexdigest()[:16]


class ResultFile:
    """cells.jsonl: one line per finished cell, with a key that identifies everything it depends on, and a checksum.

    Append-only.
    """

    def __init__(self, path: Path):
        """Reads the finished results. Raises ValueError if the file cannot be read or written."""
        self._path = path
        self.results: dict[str, Result] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = read_small(path) if path.is_file() else b""
            complete = content.rfind(b"\n") + 1
            if complete < len(content) and jax.process_index() == 0:  # a killed process left an unfinished line
                os.truncate(path, complete)
            for line in content[:complete].decode().splitlines():
                row = json.loads(line)
                if row["sha256"] != _digest(row["key"], row["result"]):
                    raise ValueError(f"the checksum of {row['key']!r:.40} differs")
                self.results[row["key"]] = row["result"]
        except OSError as error:
            fix = "fix the cause and run the same command again"
            raise ValueError(f"cannot write to {path} ({error.strerror}); {fix}") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            problem = f"{path} has a damaged line ({first_line(error)})"
            raise ValueError(f"{problem}; remove it, or use another --name") from error

    def add(self, key: str, result: Result) -> None:
        """Appends a result, from the first process only. Raises ValueError if it cannot be written."""
        if jax.process_index() > 0:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result, "sha256": _digest(key, result)}) + "\n")
        except OSError as error:
            fix = "fix the cause and run the same command again; it keeps finished results"
            raise ValueError(f"cannot write to {self._path} ({error.strerror}); {fix}") from error
