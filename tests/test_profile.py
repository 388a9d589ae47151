import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from ringattn.training.metrics import Metrics, Recorder, Screen
from ringattn.training.profile import Profile


@jax.jit
def work(x):
    return jnp.sin(x @ x)


def go(profile, begin, end, rows=None):
    """Steps begin + 1 to end of a loop that computes something."""
    rows = [] if rows is None else rows
    recorder = Recorder(rows.append, Screen(end, begin), 1, 1, None)
    for step in range(begin + 1, end + 1):
        profile.before(step, recorder)
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            total = work(jnp.ones((64, 64))).sum()
        recorder.step(step, Metrics(total, total, total), 1)
        profile.after(step, recorder)
    recorder.settle()


def traced(folder):
    """What Perfetto is given: a JSON object of events, each of a phase."""
    (found,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(found) as file:
        events = json.load(file)["traceEvents"]
    assert all("ph" in event for event in events if event)
    return found, events


def test_the_steps_asked_for_are_traced(tmp_path, capsys):
    screen = Screen(10, 4)
    with Profile("2:3", 4, 10, tmp_path / "profile", screen) as profile:
        go(profile, 4, 10)
    found, events = traced(tmp_path / "profile")
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "step"]
    assert sorted(steps) == ["6", "7"]
    assert len([event for event in events if event.get("ph") == "X"]) > 2  # what the devices did in them
    assert f"profile (steps 6 to 7): open {found} at https://ui.perfetto.dev" in capsys.readouterr().out


def test_a_start_that_ends_early_leaves_what_there_is(tmp_path, capsys):
    with Profile("1:5", 0, 5, tmp_path / "profile", Screen(5, 0)) as profile:
        go(profile, 0, 2)
    _, events = traced(tmp_path / "profile")
    assert len([event for event in events if event.get("name") == "step"]) == 2
    assert "profile (cut short): open " in capsys.readouterr().out


def test_tracing_is_not_counted_in_the_speed(tmp_path, monkeypatch):
    stop = jax.profiler.stop_trace

    def slow_stop():
        stop()
        time.sleep(2)

    monkeypatch.setattr(jax.profiler, "stop_trace", slow_stop)
    rows = []
    with Profile("2:2", 0, 4, tmp_path / "profile", Screen(4, 0)) as profile:
        go(profile, 0, 4, rows)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["step_seconds"] for row in rows[1:]) < 2


def test_nothing_is_traced_unasked(tmp_path):
    with Profile(None, 0, 2, tmp_path / "profile", Screen(2, 0)) as profile:
        go(profile, 0, 2)
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_made_does_not_end_the_run(tmp_path, capsys):
    with Profile("1:2", 0, 2, tmp_path / "profile", Screen(2, 0)) as profile:
        jax.profiler.start_trace(tmp_path / "other")
        go(profile, 0, 2)
        jax.profiler.stop_trace()
    assert "no profile: " in capsys.readouterr().out


def test_the_steps_must_be_of_this_start(tmp_path):
    with pytest.raises(ValueError, match=r"profile='2:9', but this start has 3 steps to do, 5 to 7: use --profile 1:3"):
        Profile("2:9", 4, 7, tmp_path, Screen(7, 4))
