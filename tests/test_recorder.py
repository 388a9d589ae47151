"""Rows of the recorder: speed and MFU per row, and the lines on the display."""

import jax.numpy as jnp
import pytest

from ringattn.runs.progress import Display
from ringattn.training import recorder as recorder_module
from ringattn.training.optimizer import MAX_IN_A_ROW, Skips
from ringattn.training.recorder import LogConfig, NonFiniteError, Recorder
from ringattn.training.step import Metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set by hand."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(recorder_module, "time", clock)
    return clock


def metrics(loss=2.0):
    return Metrics(jnp.float32(loss), jnp.float32(1.0), jnp.float32(0.1))


def test_mfu_counts_the_steps_since_the_last_row_and_only_their_time(clock):
    rows = []
    recorder = Recorder(rows.append, Display(4), LogConfig(every=2, end_step=4, tokens_per_step=10, peak_flops=1000.0))
    for step, flops in enumerate((100, 200, 400, 600), 1):
        recorder.step(step, metrics(), flops)
        clock.now += 1
        if step == 2:
            recorder.flush()
            clock.now += 50  # a validation
            recorder.restart_clock()
    recorder.flush()
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert [row["mfu"] for row in rows] == pytest.approx([100 / 1000, 200 / 1000, 1000 / 2000], rel=1e-6)
    assert [row["flops_per_token"] for row in rows] == [10, 20, 50]
    assert rows[2]["tokens_per_second"] == 10
    assert rows[2]["tokens"] == 40


def test_rows_count_the_tokens_of_earlier_stages_and_include_the_steps_to_log_always(clock):
    rows = []
    section = LogConfig(
        every=50, end_step=8, tokens_per_step=10, peak_flops=None, token_offset=1000 - 5 * 10, always=(6, 8)
    )
    recorder = Recorder(rows.append, Display(8, 5), section)
    for step in (6, 7, 8):
        recorder.step(step, metrics(), 100)
        clock.now += 1
    recorder.flush()
    assert [(row["step"], row["tokens"]) for row in rows] == [(6, 1010), (8, 1030)]
    assert rows[0]["mfu"] is None  # the peak is unknown


def test_a_step_is_recorded_after_the_next_is_dispatched(clock):
    rows = []
    recorder = Recorder(rows.append, Display(2), LogConfig(every=1, end_step=2, tokens_per_step=10, peak_flops=None))
    assert not recorder.step(1, metrics(3.0), 100)
    assert rows == []
    clock.now += 1
    assert recorder.step(2, metrics(2.0), 100)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.0)]


def test_a_loss_that_is_not_finite_is_an_error(clock):
    recorder = Recorder([].append, Display(2), LogConfig(every=1, end_step=2, tokens_per_step=10, peak_flops=None))
    recorder.step(1, metrics(float("nan")), 100)
    clock.now += 1
    with pytest.raises(ValueError, match=r"loss became nan at step 1; lower --optimizer.learning_rate"):
        recorder.flush()
    with pytest.raises(ValueError, match=r"the validation loss became inf at step 1; lower --optimizer.learning_rate"):
        recorder.validation(1, {"eval/loss": float("inf"), "eval/accuracy": 0.0})


def skipping(loss, norm, *counts):
    return metrics(loss)._replace(grad_norm=jnp.float32(norm), skips=Skips(*map(jnp.int32, counts)))


def test_skipped_updates_are_printed_counted_and_confirm_nothing_unless_finite(clock, capsys):
    rows = []
    config = LogConfig(every=1, end_step=9, tokens_per_step=10, peak_flops=None, max_loss=50.0)
    recorder = Recorder(rows.append, Display(9), config)
    steps = [skipping(2.0, 1.0, 0, 0, 0), skipping(9.0, 70.0, 1, 1, 1), skipping(float("nan"), float("nan"), 2, 2, 2)]
    confirmed = []
    for step, each in enumerate([*steps, skipping(60.0, 8.0, 3, 3, 3), skipping(2.0, 1.0, 3, 0, 3)], 1):
        recorder.step(step, each, 100)
        clock.now += 1
        recorder.flush()
        confirmed.append(recorder.confirmed_step)
    assert confirmed == [0, 1, 1, 1, 4]
    assert [(row["loss"], row["grad_norm"], row["skipped"]) for row in rows] == [
        (2.0, 1.0, 0),
        (9.0, 70.0, 1),
        (None, None, 2),
        (60.0, 8.0, 3),
        (2.0, 1.0, 3),
    ]
    lines = [line.partition("  10 tokens/s")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "step 1/9  loss 2.0000",
        "step 2: update skipped (loss 9.0000, grad_norm 70), 1 skipped so far",
        "step 2/9  loss 9.0000  1 skipped",
        "step 3: update skipped (loss nan, grad_norm nan), 2 skipped so far",
        "step 3/9  loss not finite  2 skipped",
        "step 4: update skipped (loss 60.0000, grad_norm 8), 3 skipped so far",
        "step 4/9  loss 60.0000  3 skipped",
        "step 5/9  loss 2.0000  3 skipped",
    ]


def test_too_many_skipped_updates_are_an_error(clock):
    recorder = Recorder([].append, Display(9), LogConfig(every=1, end_step=9, tokens_per_step=10, peak_flops=None))
    count = "optimizer.skip_spikes skipped 5 updates in a row and 7 of the last 100 at step 3; lower --optimizer"
    with pytest.raises(ValueError, match=rf"^{count}.*; or raise --optimizer.skip_spikes$") as error:
        recorder.check(3, skipping(2.0, 70.0, 9, MAX_IN_A_ROW, 7))
    assert not isinstance(error.value, NonFiniteError)
    with pytest.raises(NonFiniteError, match=rf"^loss became inf and {count}") as error:
        recorder.check(3, skipping(float("inf"), 70.0, 9, MAX_IN_A_ROW, 7))
    assert error.value.message("a cause").startswith("loss became inf and optimizer")
    assert " at step 3; a cause; lower --" in error.value.message("a cause")


def test_a_loss_far_above_that_of_a_uniform_guess_or_without_gradient_is_an_error(clock):
    config = LogConfig(every=1, end_step=9, tokens_per_step=10, peak_flops=None, max_loss=50.0)
    recorder = Recorder([].append, Display(9), config)
    assert recorder.check(1, metrics(49.0))["loss"] == 49.0
    assert recorder.check(2, metrics(0.0)._replace(grad_norm=jnp.float32(0)))["loss"] == 0.0  # learned by heart
    assert recorder.confirmed_step == 1
    with pytest.raises(
        ValueError, match=r"^loss became 51, over 10 times that of a uniform guess at step 3; lower --opt"
    ):
        recorder.check(3, metrics(51.0))
    with pytest.raises(ValueError, match=r"^loss is 5.5, but grad_norm became 0 at step 3; lower --optimizer"):
        recorder.check(3, metrics(5.5)._replace(grad_norm=jnp.float32(0)))
    assert recorder.confirmed_step == 1


def test_a_batch_without_learned_tokens_is_null_and_confirms_nothing(clock, capsys):
    rows = []
    recorder = Recorder(rows.append, Display(3), LogConfig(every=1, end_step=3, tokens_per_step=10, peak_flops=None))
    for step, each in enumerate((metrics(), None, metrics()), 1):
        recorder.step(step, each, 100)
        clock.now += 1
    assert recorder.confirmed_step == 0
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(2.0, 1.0), (None, None)]
    assert [row["tokens_per_second"] for row in rows] == [10, 10]
    assert capsys.readouterr().out.splitlines()[1].startswith("step 2/3  no unmasked targets  10 tokens/s")
    recorder.flush()
    assert recorder.confirmed_step == 2


def test_a_line_per_row_off_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(recorder_module, "peak_bytes", lambda: None)
    display = Display(2)
    recorder = Recorder([].append, display, LogConfig(every=1, end_step=2, tokens_per_step=1234, peak_flops=None))
    recorder.step(1, metrics(), 100)
    clock.now += 1
    recorder.flush()
    monkeypatch.setattr(recorder_module, "peak_bytes", lambda: 3 * 2**29)
    recorder = Recorder([].append, display, LogConfig(every=1, end_step=2, tokens_per_step=1234, peak_flops=1000.0))
    recorder.step(2, metrics(), 500)
    clock.now += 1
    recorder.flush()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2  loss 2.0000  1,234 tokens/s  ")
    assert first.endswith(" s left")
    assert second == "step 2/2  loss 2.0000  1,234 tokens/s  mfu 50.0%  peak 1.5 GiB  0 s left"


def test_a_validation_is_written_and_printed_by_context(capsys):
    rows = []
    recorder = Recorder(rows.append, Display(1), LogConfig(every=1, end_step=1, tokens_per_step=10, peak_flops=None))
    values = {"eval/loss": 2.5, "eval/accuracy": 0.25, "eval/loss/0-63": 3.0, "eval/loss/64-127": 2.0}
    assert recorder.validation(7, values) == "validation loss 2.5000 nats per token, accuracy 25.0%"
    out = capsys.readouterr().out
    assert "step 7: validation loss 2.5000 nats per token, accuracy 25.0%\n" in out
    assert "by number of preceding tokens: 0-63: 3.0000, 64-127: 2.0000" in out
    assert rows == [{"step": 7} | values]
    bits = {"eval/loss": 2.5, "eval/accuracy": 0.25, "eval/bits_per_byte": 3.6067}
    assert recorder.validation(8, bits) == (
        "validation loss 2.5000 nats per token, 3.6067 bits per byte, accuracy 25.0%"
    )
