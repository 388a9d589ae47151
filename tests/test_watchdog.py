"""A run that hangs is ended, with the stacks of its threads."""

import subprocess
import sys
import threading

import pytest

from ringattn.runs import watchdog
from ringattn.runs.watchdog import HUNG, Watchdog, watched

HANG = """
import sys, threading, time
from pathlib import Path
from ringattn.runs import watchdog
watchdog.LEAST_SECONDS, watchdog.PATIENT_SECONDS = 0.2, float(sys.argv[2])

def collective():
    threading.Event().wait()

with watchdog.watched(Path(sys.argv[1])) as each:
    for step in range(int(sys.argv[3])):
        time.sleep(0.05)
        each.progress(f"step {step}")
    collective()
"""


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_that_hangs_is_ended(tmp_path, steps):
    file = tmp_path / "hang-0.txt"
    patience = "0.2" if steps == 0 else "1000"
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(file), patience, str(steps)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == HUNG
    after = "after step 2; the longest" if steps else "at the first step; stacks"
    assert done.stderr.startswith("error: the run hangs: nothing has completed for ")
    assert after in done.stderr
    assert done.stderr.endswith(f"; stacks of all threads in {file}; run the same command again to resume\n")
    assert "in collective" in file.read_text()


def test_the_limit_follows_the_longest_time(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 10.0)
    monkeypatch.setattr(watchdog, "PATIENT_SECONDS", 1000.0)
    each = Watchdog(tmp_path / "hang")
    assert each.limit == 1000.0  # before the first step
    for seconds in (500.0, 0.5, 3.0, 1.0):
        each._since, each._waited = each._since - seconds, seconds
        each.progress("step")
    assert each.limit == pytest.approx(10 * 3.0, rel=0.01)  # without the time to the first step
    with each.patient():
        assert each.limit == 1000.0
        each._since, each._waited = each._since - 90.0, 90.0
        each.progress("validation, with its compilation")
    assert each.limit == pytest.approx(10 * 3.0, rel=0.01)


def test_the_last_write_has_more_time(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "PATIENT_SECONDS", 1000.0)
    each = Watchdog(tmp_path / "hang")
    each.progress("step 1")
    each._waited = 90.0
    with pytest.raises(KeyError), each.patient_after():
        raise KeyError
    assert (each.limit, each._waited) == (1000.0, 0.0)


def test_the_time_of_a_suspended_process_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 1.0)
    each = Watchdog(tmp_path / "hang")
    each.progress("step 1")
    each._since -= 3600  # suspended: the thread has not run
    each.progress("step 2")
    assert each.limit <= 10 * 2 * watchdog.TICK


def test_an_error_of_the_board_does_not_end_the_watch(monkeypatch):
    def fail(directory):
        raise RuntimeError("unavailable")

    monkeypatch.setattr(watchdog, "several_processes", lambda: True)
    monkeypatch.setattr(watchdog.board, "read", fail)
    assert not watchdog._another_hangs()


def test_it_ends_with_its_context(tmp_path):
    with watched(tmp_path / "hang"):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(10)
            assert not thread.is_alive()
