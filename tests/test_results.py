"""Stored results of an evaluation."""

from pathlib import Path

import pytest

from ringattn.evaluation.results import ResultFile


def test_finished_results_survive_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "evaluations" / "cells.jsonl"
    results = ResultFile(path)
    results.add("first", {"loss": 1.0})
    before = path.read_bytes()

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(ValueError, match=r"\(No space left on device\); .* keeps finished results"):
            results.add("second", {})
    assert path.read_bytes() == before
    assert ResultFile(path).results == {"first": {"loss": 1.0}}


def test_an_unfinished_line_is_removed(tmp_path):
    path = tmp_path / "cells.jsonl"
    ResultFile(path).add("first", {"loss": 1.0})
    before = path.read_bytes()
    with path.open("a") as file:
        file.write('{"key": "0123')  # a line that was being written when the power failed
    assert ResultFile(path).results == {"first": {"loss": 1.0}}
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: '{"key": "0123"}\n',
        lambda line: "[" * 100_000 + "\n",
        lambda line: line.replace("1.5", "1.4"),
        lambda line: line.replace("first", "fist"),
        lambda line: line.replace('{"loss": 1.5}', "[]"),
        lambda line: line.replace("1.5", "1.5\xff"),
    ],
)
def test_a_damaged_line_is_an_error(tmp_path, damage):
    path = tmp_path / "cells.jsonl"
    ResultFile(path).add("first", {"loss": 1.5})
    path.write_bytes(damage(path.read_text()).encode("latin-1"))
    with pytest.raises(ValueError, match=r"cells.jsonl has a damaged line \(.*\); remove it, or use another --name"):
        ResultFile(path)


def test_a_file_that_could_fill_the_memory_is_an_error(tmp_path):
    with (tmp_path / "cells.jsonl").open("wb") as file:
        file.truncate(2**43)  # takes no space on the disk
    with pytest.raises(ValueError, match=r"8,796,093,022,208 bytes, more than .*; remove it, or use another --name"):
        ResultFile(tmp_path / "cells.jsonl")
