"""Runs of the training loop: resumed, stopped, interrupted, in stages."""

import errno
import gzip
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ringattn import config
from ringattn.config import Stage
from ringattn.data import Loader
from ringattn.runs.checkpoint import Checkpoints, saved_steps
from ringattn.runs.metrics import read_rows, stage_ends
from ringattn.training import launch, loop, stage, steps, train
from ringattn.training.recorder import Recorder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Config of a run of a few seconds on all eight devices."""
    directory = tmp_path_factory.mktemp("loop")
    rng = np.random.default_rng(0)
    for number in range(100):
        (directory / f"{number}.txt").write_bytes(rng.integers(97, 107, 50, dtype=np.uint8).tobytes())
    return config.Config(
        name="small",
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(directory / "*.txt"), seq_len=32, validation=0.3),
        mesh=config.Mesh(context=8),
        optimizer=config.Optimizer(warmup_steps=2),
        train=config.Train(steps=6, batch_size=2),
        validation=config.Validation(every=4, batches=2),
        checkpoint=config.Checkpoint(every=3),
        log=config.Log(every=2, directory=str(directory / "runs")),
    )


@pytest.fixture(scope="module")
def second_starts():
    """Second starts of the run of `finished`: the moment, the error, and whether all files remained unchanged."""
    return []


@pytest.fixture(scope="module")
def finished(base, second_starts):
    """Directory of a completed run. A file that is opened twice in a process is locked as in two processes."""

    def files():
        return {path: path.stat().st_mtime_ns for path in base.run_directory.rglob("*")}

    def before(patch, owner, name):
        original = vars(owner)[name]

        def start_again(*args):
            patch.setattr(owner, name, original)  # once, and not in the second start
            before_it = files()
            try:
                refusal = str(train(base))
            except ValueError as error:
                refusal = str(error)
            second_starts.append((name, refusal, files() == before_it))
            return original(*args)

        patch.setattr(owner, name, start_again)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringattn.runs.lock.INTERVAL", 0.001)
        for owner, name in (launch, "read"), (steps, "compile_step"), (Recorder, "step"), (loop.Checkpoints, "save"):
            before(patch, owner, name)
        assert train(base) == 0
    return base.run_directory


def test_a_complete_directory(base, finished):
    assert config.load(finished / "config.json") == base
    assert json.loads((finished / "environment.json").read_text())["devices"]["count"] == 8
    assert saved_steps(finished / "checkpoints") == [6, 3]
    assert (finished / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = read_rows(finished / "metrics.jsonl")
    assert [(row["step"], "loss" in row) for row in rows] == [
        (1, True),
        (2, True),
        (4, True),
        (4, False),
        (6, True),
        (6, False),
    ]
    assert list(rows[0])[:5] == ["step", "loss", "grad_norm", "learning_rate", "tokens"]
    assert list(rows[0])[5:9] == ["tokens_per_second", "step_seconds", "mfu", "peak_bytes"]
    assert list(rows[0])[9:] == ["flops_per_token", "stage"]
    assert rows[2]["tokens"] == 4 * 2 * 32
    assert rows[2]["tokens_per_second"] == pytest.approx(64 / rows[2]["step_seconds"])
    assert rows[-1]["eval/bits_per_byte"] > rows[-1]["eval/loss"] / np.log(2)  # boundary tokens have no byte


def test_a_second_start_is_refused_at_any_moment(finished, second_starts):
    """And the first one writes a complete directory: see above."""
    assert [moment for moment, *_ in second_starts] == ["read", "compile_step", "step", "save"]
    for moment, refusal, unchanged in second_starts:
        in_use = (
            rf"{finished} is in use by process {os.getpid()} on host .*: wait for it, stop it, or use another --name"
        )
        assert re.fullmatch(in_use, refusal), moment
        assert unchanged, moment
    assert not (finished / ".lock").exists()


def test_the_sizes_of_both_sides_are_printed_first(base, finished, capsys):
    assert train(base) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "data: 3,570 training tokens (70.0%) in 70 documents, 1,530 held-out tokens (30.0%, data.validation=0.3) "
        "in 30 documents"
    )


def test_statistics_of_the_compiled_step(finished):
    statistics = json.loads((finished / "compiled.json").read_text())
    assert list(statistics) == ["compile_seconds", "parameters", "flops_per_token", "device_bytes", "attention"]
    assert statistics["attention"]["kinds"]["full"]["hops"] == 7
    assert statistics["device_bytes"]["total"] > statistics["device_bytes"]["arguments"] > 0


def test_a_run_with_writers_and_profile_on_a_terminal(base, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    c = replace(base, name="tracked", profile="2:3", log=replace(base.log, tensorboard=True, wandb=True))
    assert train(c) == 0
    out = capsys.readouterr().out
    assert "attention: ring, 7 of 7 hops per layer" in out
    assert "profile (steps 2 to 3): open " in out
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    assert "compiling the train step 0:00" in out
    # The validations of steps 4 and 6: the first one compiles.
    assert [*dict.fromkeys(re.findall(r"0/2 validation *(compiling|-:--:--)", out))] == ["compiling", "-:--:--"]
    assert len(list(c.run_directory.rglob("perfetto_trace.json.gz"))) == 1
    assert config.load(c.run_directory / "config.json") == replace(c, profile=None)
    more = replace(c, profile=None, train=replace(c.train, steps=8))
    assert train(more) == 0
    assert len(list((c.run_directory / "tensorboard").iterdir())) == 2
    files = list(c.run_directory.glob("wandb/offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{(c.run_directory / 'wandb' / 'run_id').read_text()}"}
    assert len(files) == 2


def test_a_completed_run_has_nothing_to_do(base, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert train(base) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_run_interrupted_after_its_last_step_is_completed(base, finished):
    for name in ("samples.txt", "plots/loss.png"):
        (finished / name).unlink()
    assert train(base) == 0
    assert (finished / "samples.txt").read_text().startswith("=== 1: prompt")
    assert (finished / "plots" / "loss.png").is_file()


def test_a_run_resumes_with_more_steps(base, finished, capsys):
    more = replace(base, train=replace(base.train, steps=8))
    assert train(more) == 0
    assert "resuming from step 6" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(finished / "metrics.jsonl")] == [1, 2, 4, 4, 6, 6, 8, 8]
    assert config.load(finished / "config.json") == more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, resume="never"), r"resume='never', but .* has a checkpoint .* another --name"),
        (lambda c: replace(c, name="other", resume="must"), r"resume='must', but .* has no checkpoint"),
        (lambda c: replace(c, train=replace(c.train, seed=5)), r"train.seed=5, but the run .* --train.seed 0"),
    ],
)
def test_a_config_that_does_not_fit_the_run_is_refused(base, finished, change, message):
    with pytest.raises(ValueError, match=message):
        train(change(base))


def test_other_data_are_refused(base, finished):
    content = (finished / "data.json").read_text()
    (finished / "data.json").write_text(json.dumps(json.loads(content) | {"training": "0" * 16}))
    with pytest.raises(ValueError, match=r"data.path=.* has changed since the run in .*; restore the data, or start"):
        train(base)
    (finished / "data.json").write_text(content)


def test_a_directory_that_cannot_be_written_is_an_error(base):
    with pytest.raises(ValueError, match=r"cannot write to /proc/none/small .*; use another --log.directory"):
        train(replace(base, log=replace(base.log, directory="/proc/none")))


def test_a_model_that_cannot_fit_is_refused_before_data_are_read(base, monkeypatch):
    """Compiling and allocating the state of a billion layers would take hours."""
    monkeypatch.setattr(launch, "read", lambda *_: pytest.fail("data were read"))
    absurd = replace(base, name="absurd", model=replace(base.model, layers=10**9))
    with pytest.raises(ValueError, match=r"each of 8 cpu devices needs at least .*; reduce model\.layers=1000000000$"):
        train(absurd)
    assert not absurd.run_directory.exists()


def test_a_kernel_that_cannot_train_is_refused_before_data_are_read(base, monkeypatch):
    """JAX cannot compute the interpreter of the kernel "pallas" again, as the train step does with each layer."""
    monkeypatch.setattr(launch, "read", lambda *_: pytest.fail("data were read"))
    interpreted = replace(base, name="interpreted", attention=replace(base.attention, kernel="pallas"))
    with pytest.raises(
        ValueError, match=r"attention.kernel='pallas' trains on TPUs only: .*; use --attention.kernel auto"
    ):
        train(interpreted)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_the_run_after_a_checkpoint(base, monkeypatch, capsys, number):
    c = replace(base, name=f"stopped-{number.name}", train=replace(base.train, steps=8))
    handler, record = signal.getsignal(number), Recorder.step

    def interrupted(self, step, metrics, flops):
        if step == 5:
            os.kill(os.getpid(), number)
        record(self, step, metrics, flops)

    monkeypatch.setattr(Recorder, "step", interrupted)
    assert train(c) == 128 + number
    assert f"stopped by {number.name} after step 5" in capsys.readouterr().out
    assert saved_steps(c.run_directory / "checkpoints")[0] == 5
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize("moment", ["token", pytest.param("step", marks=pytest.mark.slow)])
def test_a_signal_at_the_end_leaves_the_samples_to_the_next_start(base, monkeypatch, capsys, moment):
    c = replace(base, name=f"samples-{moment}")
    record, tokens = Recorder.step, []
    sample: Any = stage.sample

    def last_step(self, step, metrics, flops):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, step, metrics, flops)

    def interrupted(*args):
        def after_token():
            tokens.append(1)
            if len(tokens) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            args[-1]()

        return sample(*args[:-1], after_token)

    with monkeypatch.context() as patch:
        if moment == "step":
            patch.setattr(Recorder, "step", last_step)
        patch.setattr(stage, "sample", interrupted)
        assert train(c) == 128 + signal.SIGTERM
    assert len(tokens) == (2 if moment == "token" else 0)
    assert "stopped by SIGTERM after step 6; checkpoint saved" in capsys.readouterr().out
    assert saved_steps(c.run_directory / "checkpoints") == [6, 3]
    assert not (c.run_directory / "samples.txt").exists()
    assert train(c) == 0
    assert (c.run_directory / "samples.txt").exists()
    assert (c.run_directory / "plots" / "loss.png").exists()


@pytest.mark.parametrize("rate", [1e8, pytest.param(1e38, marks=pytest.mark.slow)])
def test_a_diverged_run_saves_no_state_that_cannot_be_resumed(base, capfd, rate):
    """A state that is finite, with a loss that is finite, may be ruined: its next gradient is not, or is 0."""
    c = replace(
        base,
        name=f"diverged-{rate}",
        optimizer=replace(base.optimizer, learning_rate=rate),
        checkpoint=config.Checkpoint(every=1, keep=1),
        train=replace(base.train, steps=3),
        validation=replace(base.validation, every=2),
    )
    with pytest.raises(ValueError, match=r"(became|NaN or infinity).* step \d; .*lower --optimizer.learning_rate and"):
        train(c)
    checkpoints = c.run_directory / "checkpoints"
    assert not list(checkpoints.glob("*tmp*"))
    assert capfd.readouterr().err == ""
    assert train(replace(c, optimizer=base.optimizer)) == 0
    assert saved_steps(checkpoints) == [3]
    assert read_rows(c.run_directory / "metrics.jsonl")[-1]["eval/loss"] < 6


@pytest.fixture
def infinite(monkeypatch):
    """infinite(*steps): makes the loss of row 1 infinite in the batches of these steps."""
    original = Loader.batch

    def make_infinite(*steps):
        def batch(self, *args):
            rows, step = original(self, *args), args[0]
            rows.weights[1, 3] = np.nan if step + 1 in steps else rows.weights[1, 3]
            return rows

        monkeypatch.setattr(Loader, "batch", batch)

    return make_infinite


def test_a_step_that_is_not_finite_is_named_with_its_row(base, infinite, capsys):
    c = replace(base, name="infinite", validation=replace(base.validation, every=100))
    infinite(5)
    message = (
        r"^loss became nan at step 5; not finite first: the losses, in row 1 \(0 to 1\) of the batch; .*; lower --"
    )
    with pytest.raises(ValueError, match=message):
        train(c)
    assert "loss became nan at step 5: computing the step again" in capsys.readouterr().out
    assert saved_steps(c.run_directory / "checkpoints") == [3]
    assert [row["step"] for row in read_rows(c.run_directory / "metrics.jsonl")] == [1, 2, 4]


@pytest.mark.slow
def test_skipped_updates_are_the_same_in_a_resumed_run(base, infinite, monkeypatch, capsys):
    """The extra step that confirms the last checkpoint is skipped too, so the one after it confirms it."""
    infinite(3, 5, 9)
    optimizer = replace(base.optimizer, skip_spikes=5.0)
    c = replace(
        base, name="skipping", optimizer=optimizer, train=replace(base.train, steps=8), log=replace(base.log, every=1)
    )
    assert train(c) == 0
    out = capsys.readouterr().out
    assert "step 5: update skipped (loss nan, grad_norm nan), 2 skipped so far\n" in out
    rows = rows_without_times(c.run_directory)
    assert [row["skipped"] for row in rows if "loss" in row] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [row["step"] for row in rows if "loss" in row and row["loss"] is None] == [3, 5]
    resumed = replace(c, name="skipping-resumed")
    cut_off(5, resumed, monkeypatch)
    assert train(resumed) == 0
    assert rows_without_times(resumed.run_directory) == rows
    # The option may change: without it, the checkpoint's history of gradient norms is dropped; with it, it starts.
    for number, factor in enumerate((None, 5.0), 9):
        infinite()
        more = replace(c, optimizer=replace(optimizer, skip_spikes=factor), train=replace(c.train, steps=number))
        assert train(more) == 0
        assert f"resuming from step {number - 1}" in capsys.readouterr().out
        row = next(row for row in read_rows(c.run_directory / "metrics.jsonl")[::-1] if "loss" in row)
        assert (row["step"], row.get("skipped")) == (number, None if factor is None else 0)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_checkpoint_is_confirmed_by_one_more_step(base, monkeypatch, stopped):
    """The last update ruins the state, with a finite validation loss: activations overflow to 0."""
    rate, steps, record = replace(base.optimizer, learning_rate=1e20), 2 if stopped else 1, Recorder.step
    c = replace(base, name=f"last-{stopped}", train=replace(base.train, steps=steps), optimizer=rate)

    def interrupted(self, step, metrics, flops):
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, step, metrics, flops)

    monkeypatch.setattr(Recorder, "step", interrupted)
    with pytest.raises(ValueError, match=r"grad_norm became \w+ at step 2; .*lower --optimizer.learning_rate"):
        train(c)
    assert saved_steps(c.run_directory / "checkpoints") == []
    assert [row["step"] for row in read_rows(c.run_directory / "metrics.jsonl")] == [1] * (1 if stopped else 2)


@pytest.mark.slow
def test_a_full_disk_loses_no_checkpoint_of_a_confirmed_state(base, monkeypatch, capsys):
    """Neither while a row is written after the step that confirms it, nor after the last step."""
    c = replace(base, name="full", log=replace(base.log, every=1))
    checkpoints, record = c.run_directory / "checkpoints", Recorder.step

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", lambda self, step, *rest: full() if step == 5 else record(self, step, *rest))
        with pytest.raises(OSError, match="No space left"):
            train(c)
    assert saved_steps(checkpoints) == [3]
    with monkeypatch.context() as patch:
        patch.setattr(steps, "plot_loss", full)
        with pytest.raises(ValueError, match="No space left"):
            train(c)
    assert saved_steps(checkpoints) == [6, 3]
    assert "resuming from step 3" in capsys.readouterr().out
    assert train(c) == 0
    assert (c.run_directory / "plots" / "loss.png").is_file()


STAGES = (
    Stage(steps=4, seq_len=16, batch_size=4, data=4, context=2),
    Stage(steps=4, seq_len=32, batch_size=2, data=2, context=4, rope_theta=30_000.0, learning_rate=1e-3),
    Stage(steps=3, seq_len=64, batch_size=1, data=1, context=8, rope_theta=100_000.0),
)


@pytest.fixture(scope="module")
def staged(base):
    """Config of a run in three stages. Each doubles the length of the rows and the size of the ring."""
    return replace(
        base,
        name="staged",
        stages=STAGES,
        validation=replace(base.validation, every=50),
        checkpoint=config.Checkpoint(every=3, keep=4),
    )


@pytest.fixture(scope="module")
def uninterrupted(staged):
    """Directory of a run of the first two stages in one launch."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        for module, name in (launch, "read"), (stage, "prefetch"):
            original = name, vars(module)[name]
            patch.setattr(module, name, lambda *args, _=original: calls.append((_[0], *args)) or _[1](*args))
        c = replace(staged, stages=STAGES[:2], profile="6:7")
        assert train(c) == 0
    # The dataset is read once, not once per stage, and each stage starts with its first rows.
    assert [(name, *values) for name, _, *values in calls] == [("read", None, None), *[("prefetch", 0, 4, None)] * 2]
    assert calls[0][1] == c.stage(1).data
    return c.run_directory


def cut_off(confirmed_step, c, monkeypatch):
    """Runs `c` until it fails, after confirming the state of `confirmed_step` and before saving the newest state."""

    def failing(self, step, confirm=Checkpoints.confirm):
        confirm(self, step)
        if step == confirmed_step:
            raise InterruptedError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "confirm", failing)
        with pytest.raises(InterruptedError, match="cut off"):
            train(c)


def rows_without_times(directory):
    times = {"tokens_per_second", "step_seconds"}
    rows = read_rows(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def test_stages_are_trained_one_after_another(uninterrupted):
    rows = read_rows(uninterrupted / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [(row["step"], row["stage"]) for row in trained] == [(1, 1), (2, 1), (4, 1), (5, 2), (6, 2), (8, 2)]
    assert [(row["step"], row["stage"]) for row in rows if "eval/loss" in row] == [(4, 1), (8, 2)]
    assert {row["tokens"] / row["step"] for row in trained} == {64}
    # Both stages warm up; the peak of the second is a third of that of the first.
    assert trained[4]["learning_rate"] == pytest.approx(trained[1]["learning_rate"] / 3)
    (path,) = (uninterrupted / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "step"} == {"6", "7"}  # of stage 2
    assert config.load(uninterrupted / "config.json").stages == STAGES[:2]
    assert saved_steps(uninterrupted / "checkpoints")[0] == 8
    assert (uninterrupted / "samples.txt").read_text().startswith("=== 1: prompt")
    assert stage_ends(rows) == [4]


@pytest.mark.slow
def test_a_run_cut_off_in_each_stage_ends_like_an_uninterrupted_run(staged, uninterrupted, monkeypatch, capsys):
    c = replace(staged, name="cut", stages=STAGES[:2])
    for step in (0, 7):
        cut_off(step, c, monkeypatch)
    # Step 4 is the last of stage 1.
    assert saved_steps(c.run_directory / "checkpoints") == [6, 4, 3]
    capsys.readouterr()
    assert train(c) == 0
    out = capsys.readouterr().out
    assert "stage 2 of 2, steps 5 to 8: 2 rows of 32 tokens, 4 devices per row\n" in out
    assert "resuming from step 6" in out
    assert "stage 1" not in out
    assert rows_without_times(c.run_directory) == rows_without_times(uninterrupted)
    assert train(c) == 0
    assert "at step 8 of 8; to continue, raise --stages.2.steps" in capsys.readouterr().out


def test_damaged_checkpoints_return_the_run_to_the_stage_before(staged, uninterrupted, monkeypatch, capsys):
    c = replace(staged, name="damaged", stages=STAGES[:2])
    shutil.copytree(uninterrupted, c.run_directory)
    for step in (8, 6, 4):
        for path in (c.run_directory / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    cut_off(3, c, monkeypatch)
    out = capsys.readouterr().out
    assert all(f"checkpoint {step} is damaged (" in out for step in (8, 6, 4))
    assert out.index("damaged") < out.index("stage 1 of 2") < out.index("resuming from step 3")
    expected = [row for row in rows_without_times(uninterrupted) if row["step"] < 4]
    assert rows_without_times(c.run_directory)[: len(expected)] == expected


def test_a_signal_in_the_last_step_of_a_stage_stops_the_run(staged, monkeypatch, capsys):
    c, record = replace(staged, name="between"), Recorder.step

    def interrupted(self, step, metrics, flops):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, step, metrics, flops)

    monkeypatch.setattr(Recorder, "step", interrupted)
    assert train(c) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 4; checkpoint saved" in out
    assert "stage 2" not in out
    assert saved_steps(c.run_directory / "checkpoints")[0] == 4


@pytest.mark.slow
def test_a_stage_added_to_a_completed_run_counts_its_own_tokens(base, capsys):
    c = replace(base, name="extended")
    assert train(c) == 0
    extended = replace(c, stages=(Stage(), Stage(steps=2, seq_len=16, data=2, context=4)))
    assert train(extended) == 0
    assert "stage 2 of 2, steps 7 to 8: 2 rows of 16 tokens, 4 devices per row" in capsys.readouterr().out
    rows = [row for row in read_rows(c.run_directory / "metrics.jsonl") if "loss" in row]
    tokens = [(row["step"], row["stage"], row["tokens"]) for row in rows]
    assert tokens == [(1, 1, 64), (2, 1, 128), (4, 1, 256), (6, 1, 384), (7, 2, 416), (8, 2, 448)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"seq_len": 4096},
            r"^stage 3: the .* text has .* of stages.3.seq_len=4096, fewer than stages.3.batch_size=1",
        ),
        ({"seq_len": 36}, r"^stage 3: stages.3.seq_len=36 must be a positive multiple of 2 \* \S*context = 16"),
        ({"context": 3}, r"^stage 3: mesh data=1 x context=3 .* does not fit 8 devices; use --stages.3.\w+ \d"),
        (
            {"data": 8, "context": 1},
            r"^stage 3: stages.3.batch_size=1 must be a multiple of stages.3.data \* train.acc",
        ),
    ],
)
def test_a_stage_that_does_not_fit_is_refused_before_the_first_stage_starts(staged, values, message):
    stages = (*STAGES[:2], replace(STAGES[2], **values))
    c = replace(staged, name="impossible", stages=stages)
    with pytest.raises(ValueError, match=message):
        train(c)
    assert not c.run_directory.exists()


def free_space(monkeypatch, steps_without):
    """Lets `Checkpoints.save` find a full disk at some steps."""
    save, usage = Checkpoints.save, shutil.disk_usage

    def limited(self, step, tree):
        with monkeypatch.context() as patch:
            if step in steps_without:
                patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
            save(self, step, tree)

    monkeypatch.setattr(Checkpoints, "save", limited)


@pytest.mark.parametrize(("without", "saved"), [({3}, [6]), ({6}, [3])])
def test_training_continues_after_a_failed_save_and_the_status_reports_it(base, monkeypatch, capsys, without, saved):
    c = replace(base, name=f"unsaved-{saved[0]}")
    with monkeypatch.context() as patch:
        free_space(patch, without)
        assert train(c) == loop.NOT_SAVED
    out = capsys.readouterr().out
    assert f"checkpoint {min(without)} was not saved to " in out
    assert ("step 6 is not saved: the newest checkpoint is of step 3" in out) == (saved == [3])
    assert saved_steps(c.run_directory / "checkpoints") == saved
    assert read_rows(c.run_directory / "metrics.jsonl")[-1]["step"] == 6
    assert train(c) == 0  # nothing to do, or steps 4 to 6 again
    assert saved_steps(c.run_directory / "checkpoints")[0] == 6


def test_a_stage_whose_last_state_is_not_saved_ends_the_run(staged, monkeypatch, capsys):
    """The next stage starts from a checkpoint."""
    c = replace(staged, name="unsaved-stage", stages=STAGES[:2])
    free_space(monkeypatch, {3, 4})
    assert train(c) == loop.NOT_SAVED
    assert "step 4 is not saved: the newest checkpoint is of step 0" in capsys.readouterr().out


def test_a_signal_during_a_validation_ends_it(base, monkeypatch, capsys):
    c = replace(base, name="validating")
    score = steps.Watchdog.progress

    def interrupted(self, event):
        if event == "a batch of the validation":
            os.kill(os.getpid(), signal.SIGTERM)
        score(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(steps.Watchdog, "progress", interrupted)
        assert train(c) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 4; checkpoint saved" in capsys.readouterr().out
    assert saved_steps(c.run_directory / "checkpoints")[0] == 4
    assert not any("eval/loss" in row for row in read_rows(c.run_directory / "metrics.jsonl"))
