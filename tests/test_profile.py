"""Profiles: the requested steps are traced, tracing is excluded from the speed, a failure does not stop a run."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from ringattn.runs.progress import Display
from ringattn.training.profile import Profile
from ringattn.training.recorder import LogConfig, Recorder
from ringattn.training.step import Metrics


@jax.jit
def work(x):
    return jnp.sin(x @ x)


def run_steps(profile, start, end):
    """Runs steps start + 1 to end of a loop that computes something; returns the rows of the steps."""
    rows = []
    section = LogConfig(every=1, end_step=end, tokens_per_step=1, peak_flops=None)
    recorder = Recorder(rows.append, Display(end, start), section)
    for step in range(start + 1, end + 1):
        profile.before(step, recorder)
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            total = work(jnp.ones((64, 64))).sum()
        recorder.step(step, Metrics(total, total, total), 1)
        profile.after(step, recorder)
    recorder.flush()
    return rows


def read_trace(directory):
    """Path and events of the trace: JSON for Perfetto, in which each event has a phase."""
    (path,) = directory.rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert all("ph" in event for event in events if event)
    return path, events


def test_the_requested_steps_are_traced(tmp_path, capsys):
    with Profile("2:3", 4, 10, tmp_path / "profile", Display(10, 4)) as profile:
        run_steps(profile, 4, 10)
    path, events = read_trace(tmp_path / "profile")
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "step"]
    assert sorted(steps) == ["6", "7"]
    assert len([event for event in events if event.get("ph") == "X"]) > 2  # events of the devices
    assert f"profile (steps 6 to 7): open {path} at https://ui.perfetto.dev" in capsys.readouterr().out


def test_a_launch_that_ends_early_leaves_an_incomplete_trace(tmp_path, capsys):
    with Profile("1:5", 0, 5, tmp_path / "profile", Display(5)) as profile:
        run_steps(profile, 0, 2)
    _, events = read_trace(tmp_path / "profile")
    assert len([event for event in events if event.get("name") == "step"]) == 2
    assert "profile (incomplete): open " in capsys.readouterr().out


def test_the_speed_excludes_writing_the_trace(tmp_path, monkeypatch):
    stop = jax.profiler.stop_trace

    def slow_stop():
        stop()
        time.sleep(2)

    monkeypatch.setattr(jax.profiler, "stop_trace", slow_stop)
    with Profile("2:2", 0, 4, tmp_path / "profile", Display(4)) as profile:
        rows = run_steps(profile, 0, 4)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["step_seconds"] for row in rows[1:]) < 2


def test_no_trace_by_default(tmp_path):
    with Profile(None, 0, 2, tmp_path / "profile", Display(2)) as profile:
        run_steps(profile, 0, 2)
    assert not (tmp_path / "profile").exists()


def test_a_failed_trace_does_not_stop_the_run(tmp_path, capsys):
    with Profile("1:2", 0, 2, tmp_path / "profile", Display(2)) as profile:
        jax.profiler.start_trace(tmp_path / "other")
        run_steps(profile, 0, 2)
        jax.profiler.stop_trace()
    assert "profile failed: " in capsys.readouterr().out


def test_steps_beyond_the_launch_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"profile='2:9', but this launch has 3 steps, 5 to 7; use --profile 1:3"):
        Profile("2:9", 4, 7, tmp_path, Display(7, 4))
