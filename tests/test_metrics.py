"""metrics.jsonl: rows are appended, rows of an interrupted run are replaced, damage is reported."""

import resource
import signal

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


def test_a_line_that_is_not_json_is_an_error_and_a_missing_file_has_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    for line in (b'{"st', b'{"stfp": 2}', b"2", b'{"step": "2"}', b'{"s\xfftep": 2}'):
        path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"line 2 of \S*metrics.jsonl is not a row .* or use another --name"):
            read_rows(path)


def test_a_full_disk_is_an_error_and_loses_no_row(tmp_path):
    """A limit on file sizes cuts the second row, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with MetricsFile(path, after=0) as file:
            file.write({"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
            for _ in range(2):  # the first write fails after a part of the row, the second at once
                with pytest.raises(ValueError, match=r"cannot write to \S*metrics.jsonl \(.+\); free disk space or"):
                    file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b'{"step": 1}\n{"step":'
    with MetricsFile(path, after=1) as file:
        file.write({"step": 2})
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_stage_ends():
    rows = [{"step": step, "stage": stage} for step, stage in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3))]
    assert stage_ends(rows) == [4, 8]
    assert stage_ends(rows[:2]) == []
