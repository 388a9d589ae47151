"""metrics.jsonl: rows are appended, rows of an interrupted run are replaced, damage is reported."""

import resource
import signal
from contextlib import contextmanager

import pytest

from ringattn.runs.metrics import MetricsFile, read_rows, stage_ends


def test_rows_after_the_restored_step_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"ste')
    with MetricsFile(path, after=3) as file:
        file.write({"step": 4, "again": True})
    assert read_rows(path) == [{"step": 1}, {"step": 3}, {"step": 4, "again": True}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_can_be_read_while_the_file_is_open(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", after=0) as file:
        file.write({"step": 1, "mfu": None})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "mfu": None}]
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.write({"step": 2, "loss": float("nan")})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "mfu": None}]


def test_the_length_of_a_line_is_bounded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n')
        file.truncate(2**43)  # takes no space on the disk
    with pytest.raises(ValueError, match=r"line 2 of .* is not a row of metrics \(it has more than 1,048,576 bytes\)"):
        read_rows(path)


def test_a_line_that_is_not_json_is_an_error_and_a_missing_file_has_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    wrong = [b'{"st', b'{"stfp": 2}', b"2", b'{"step": "2"}', b'{"s\xfftep": 2}', b"[" * 100_000, b'{"step": null}']
    wrong += [b'{"step": 2, %s}' % each for each in (b'"stage": null', b'"loss": "3"', b'"loss": 1' + b"0" * 400)]
    for line in wrong:
        path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"line 2 of \S*metrics.jsonl is not a row .* or use another --name"):
            read_rows(path)


@contextmanager
def files_up_to(size):
    """Limits the size of files, which cuts a row as a full disk does."""
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_rows_of_a_full_disk_are_written_later(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", []
    with MetricsFile(path, after=0, report=lines.append) as file:
        file.write({"step": 1})
        with files_up_to(20):
            for step in (2, 3):
                file.write({"step": step})
                file.sync()
                assert path.read_bytes().startswith(b'{"step": 1}\n')
        file.write({"step": 4})
        assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert file.lost == 0
    assert len(lines) == 1
    assert lines[0].startswith(f"metrics cannot be written to {path} (")


def test_rows_that_the_disk_never_takes_are_counted(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", []
    with files_up_to(20), MetricsFile(path, after=0, report=lines.append) as file:
        for step in (1, 2, 3):
            file.write({"step": step})
    assert read_rows(path) == [{"step": 1}]
    assert file.lost == 2
    assert len(lines) == 2
    assert lines[1] == f"2 rows of metrics were not written to {path}"


def test_stage_ends():
    rows = [{"step": step, "stage": stage} for step, stage in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3))]
    assert stage_ends(rows) == [4, 8]
    assert stage_ends(rows[:2]) == []
    assert stage_ends([*rows, {"step": 10}]) == [4, 8]
