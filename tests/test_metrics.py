import jax.numpy as jnp
import pytest

from ringattn.training import metrics as metrics_module
from ringattn.training.metrics import Metrics, Recorder, Screen


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go on."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def metrics():
    return Metrics(jnp.float32(2.0), jnp.float32(1.0), jnp.float32(0.1))


def test_mfu_is_of_the_steps_of_a_row_and_of_their_time_alone(clock):
    rows = []
    recorder = Recorder(rows.append, Screen(4, 0), 2, 10, 1000.0)
    for step, flops in enumerate((100, 200, 400, 600), 1):
        recorder.step(step, metrics(), flops)
        clock.now += 1
        if step == 2:
            recorder.settle()
            clock.now += 50  # an evaluation
            recorder.restart_clock()
    recorder.settle()
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert [row["mfu"] for row in rows] == pytest.approx([100 / 1000, 200 / 1000, 1000 / 2000], rel=1e-6)
    assert [row["flops_per_token"] for row in rows] == [10, 20, 50]
    assert rows[2]["tokens_per_second"] == 10
    assert rows[2]["tokens"] == 40


def test_mfu_is_null_where_the_peak_is_not_known(clock):
    rows = []
    recorder = Recorder(rows.append, Screen(1, 0), 1, 10, None)
    recorder.step(1, metrics(), 100)
    clock.now += 1
    recorder.settle()
    assert rows[0]["mfu"] is None


def test_the_line_says_what_is_known(clock, capsys):
    row = {"step": 1, "loss": 2.0, "tokens_per_second": 1234.5, "mfu": None, "peak_bytes": None}
    screen = Screen(2, 0)
    screen.show(row)
    screen.show(row | {"mfu": 0.4567, "peak_bytes": 3 * 2**29})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/2  loss 2.0000  1,234 tokens/s  0.0 min left"
    assert second == "step 1/2  loss 2.0000  1,234 tokens/s  mfu 45.7%  peak 1.5 GiB  0.0 min left"


def test_an_evaluation_is_said_by_context(capsys):
    rows = []
    recorder = Recorder(rows.append, Screen(1, 0), 1, 10, None)
    values = {"eval/loss": 2.5, "eval/accuracy": 0.25, "eval/loss/0-63": 3.0, "eval/loss/64-127": 2.0}
    assert recorder.evaluation(7, values) == "validation loss 2.5000 nats per token, 25.0% right"
    assert "by tokens of context, from: 0 3.0000, 64 2.0000" in capsys.readouterr().out
    assert rows == [{"step": 7} | values]
