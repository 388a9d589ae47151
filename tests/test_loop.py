import gzip
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringattn import config
from ringattn.training import loop, train
from ringattn.training.checkpoint import saved_steps
from ringattn.training.folder import check_resumable
from ringattn.training.metrics import MetricsFile, Recorder, read_rows, stage_ends

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of seconds on all eight devices."""
    folder = tmp_path_factory.mktemp("loop")
    rng = np.random.default_rng(0)
    for number in range(100):
        (folder / f"{number}.txt").write_bytes(rng.integers(97, 107, 50, dtype=np.uint8).tobytes())
    return config.Config(
        name="small",
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(folder / "*.txt"), seq_len=32, validation=0.3),
        mesh=config.Mesh(context=8),
        optimizer=config.Optimizer(warmup_steps=2),
        train=config.Train(steps=STEPS, batch_size=2),
        evaluate=config.Evaluate(every=4, batches=2),
        checkpoint=config.Checkpoint(every=3),
        log=config.Log(every=2, directory=str(folder / "runs")),
    )


@pytest.fixture(scope="module")
def finished(base):
    """The folder of a run that went through to its end."""
    assert train(base) == 0
    return folder_of(base)


def folder_of(c):
    return Path(c.log.directory) / c.name


def test_leaves_a_complete_folder(base, finished):
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
    assert rows[-1]["eval/bits_per_byte"] > rows[-1]["eval/loss"] / np.log(2)  # boundaries stand for no byte


def test_what_was_compiled_is_kept(finished):
    facts = json.loads((finished / "compiled.json").read_text())
    assert facts["attention"]["hops"] == 7
    assert facts["device_bytes"]["total"] > facts["device_bytes"]["arguments"] > 0


def test_a_run_may_be_watched_and_traced(base, capsys):
    c = replace(base, name="watched", profile="2:3", log=replace(base.log, tensorboard=True, wandb=True))
    c = replace(c, train=replace(c.train, steps=4))
    assert train(c) == 0
    out = capsys.readouterr().out
    assert "attention by ring, 7 of 7 hops a layer" in out
    assert "profile (steps 2 to 3): open " in out
    assert len(list(c.folder.rglob("perfetto_trace.json.gz"))) == 1
    assert config.load(c.folder / "config.json") == replace(c, profile=None)
    more = replace(c, profile=None, train=replace(c.train, steps=6))
    assert train(more) == 0
    assert len(list((c.folder / "tensorboard").iterdir())) == 2
    written = list(c.folder.glob("wandb/offline-run-*/*.wandb"))
    assert {path.stem for path in written} == {f"run-{(c.folder / 'wandb' / 'run_id').read_text()}"}
    assert len(written) == 2


def test_the_same_again_has_nothing_to_do(base, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert train(base) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_run_cut_off_after_its_last_step_is_completed(base, finished):
    for name in ("samples.txt", "plots/loss.png"):
        (finished / name).unlink()
    assert train(base) == 0
    assert (finished / "samples.txt").read_text().startswith("=== 1: given")
    assert (finished / "plots" / "loss.png").is_file()


def test_goes_on_with_more_steps(base, finished, capsys):
    more = replace(base, train=replace(base.train, steps=8))
    assert train(more) == 0
    out = capsys.readouterr().out
    assert "going on from step 6" in out
    assert [row["step"] for row in read_rows(finished / "metrics.jsonl")] == [1, 2, 4, 4, 6, 6, 8, 8]
    assert config.load(finished / "config.json") == more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, resume="never"), r"resume='never', but .* has a checkpoint .* another --name"),
        (lambda c: replace(c, name="other", resume="must"), r"resume='must', but .* has no checkpoint"),
        (lambda c: replace(c, train=replace(c.train, seed=5)), r"train.seed=5, but the run .* --train.seed 0"),
        (lambda c: replace(c, model=replace(c.model, dim=32)), r"model.dim=32, but the run .* --model.dim 16"),
    ],
)
def test_refuses_what_does_not_go_with_the_run(base, finished, change, message):
    with pytest.raises(ValueError, match=message):
        train(change(base))


def test_refuses_to_go_on_with_other_text(base, finished, tmp_path):
    data = json.loads((finished / "data.json").read_text())
    (finished / "data.json").write_text(json.dumps(data | {"training": "0" * 16}))
    with pytest.raises(ValueError, match=r"the text of .* is not what the run in .* put the text back as it was"):
        train(base)
    (finished / "data.json").write_text(json.dumps(data))


def test_a_folder_that_cannot_be_written_is_an_error_with_a_cure(base):
    with pytest.raises(ValueError, match=r"cannot write to /proc/none/small .*: choose another --log.directory"):
        train(replace(base, log=replace(base.log, directory="/proc/none")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(base, monkeypatch, capsys, number):
    c = replace(base, name=f"stopped-{number.name}", train=replace(base.train, steps=50))
    usual, step = signal.getsignal(number), Recorder.step

    def interrupted(self, at, metrics, flops):
        if at == 5:
            os.kill(os.getpid(), number)
        step(self, at, metrics, flops)

    monkeypatch.setattr(Recorder, "step", interrupted)
    assert train(c) == 128 + number
    assert f"stopped by {number.name} after step 5" in capsys.readouterr().out
    assert saved_steps(folder_of(c) / "checkpoints")[0] == 5
    assert signal.getsignal(number) == usual


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(base):
    c = replace(base, name="diverged", optimizer=replace(base.optimizer, learning_rate=1e38))
    with pytest.raises(ValueError, match=r"(became nan|is not finite) .*step \d.*: lower --optimizer.learning_rate"):
        train(c)
    assert saved_steps(folder_of(c) / "checkpoints") == []


def test_rows_beyond_the_step_gone_back_to_are_cut_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"ste')
    with MetricsFile(path, after=3) as file:
        file.write({"step": 4, "again": True})
    assert read_rows(path) == [{"step": 1}, {"step": 3}, {"step": 4, "again": True}]


Stage = config.Stage
STAGES = (
    Stage(steps=4, seq_len=16, batch_size=4, data=4, context=2),
    Stage(steps=4, seq_len=32, batch_size=2, data=2, context=4, rope_theta=30_000.0, learning_rate=1e-3),
    Stage(steps=3, seq_len=64, batch_size=1, data=1, context=8, rope_theta=100_000.0),
)


@pytest.fixture(scope="module")
def staged(base):
    """A run of three stages, its rows twice as long and its ring twice as large in each."""
    return replace(
        base,
        name="staged",
        stages=STAGES,
        evaluate=replace(base.evaluate, every=50),
        checkpoint=config.Checkpoint(every=3, keep=4),
    )


@pytest.fixture(scope="module")
def whole(staged):
    """Its folder, once it went through its first two stages in one go."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        for name, usual in (("read", loop.read), ("prefetch", loop.prefetch)):
            patch.setattr(loop, name, lambda *words, _=(name, usual): calls.append((_[0], *words)) or _[1](*words))
        c = replace(staged, stages=STAGES[:2], profile="6:7")
        assert train(c) == 0
    # The text is read once, not once a stage, and each stage begins with the first of its own rows.
    assert [(name, *words[-2:]) for name, *words in calls] == [
        ("read", c.stage(1).data, None),
        ("prefetch", 0, 4),
        ("prefetch", 0, 4),
    ]
    return folder_of(c)


def broken_at(step, c, monkeypatch):
    """Runs `c` until it breaks, after `step` is computed and before it is noted or saved."""

    def breaking(self, at, metrics, flops, usual=Recorder.step):
        if at == step:
            raise InterruptedError("cut off")
        usual(self, at, metrics, flops)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", breaking)
        with pytest.raises(InterruptedError, match="cut off"):
            train(c)


def kept(folder):
    """The rows, without what depends on the clock."""
    clock = {"tokens_per_second", "step_seconds"}
    return [{name: value for name, value in row.items() if name not in clock} for row in read_rows(folder)]


def test_stages_are_trained_one_after_another(staged, whole):
    rows = read_rows(whole / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [(row["step"], row["stage"]) for row in trained] == [(1, 1), (2, 1), (4, 1), (5, 2), (6, 2), (8, 2)]
    assert [(row["step"], row["stage"]) for row in rows if "eval/loss" in row] == [(4, 1), (8, 2)]
    assert {row["tokens"] / row["step"] for row in trained} == {64}
    # Both warm up, the second to a peak of a third.
    assert trained[4]["learning_rate"] == pytest.approx(trained[1]["learning_rate"] / 3)
    (traced,) = (whole / "profile").rglob("perfetto_trace.json.gz")  # of steps of the second stage
    with gzip.open(traced) as file:
        steps = {event["args"]["step_num"] for event in json.load(file)["traceEvents"] if event.get("name") == "step"}
    assert steps == {"6", "7"}
    assert config.load(whole / "config.json").stages == STAGES[:2]
    assert saved_steps(whole / "checkpoints")[0] == 8
    assert (whole / "samples.txt").read_text().startswith("=== 1: given")
    assert stage_ends(rows) == [4]
    assert stage_ends([row for row in rows if row["stage"] == 1]) == []


def test_cut_off_inside_every_stage_it_ends_the_same(staged, whole, monkeypatch, capsys):
    c = replace(staged, name="cut", stages=STAGES[:2])
    for step in (2, 7):
        broken_at(step, c, monkeypatch)
    # Step 4 is the first stage's last.
    assert saved_steps(folder_of(c) / "checkpoints") == [6, 4, 3]
    capsys.readouterr()
    assert train(c) == 0
    out = capsys.readouterr().out
    assert "stage 2 of 2, steps 5 to 8: 2 rows of 32 tokens, a ring of 4\n" in out
    assert "going on from step 6" in out
    assert "stage 1" not in out
    assert kept(folder_of(c) / "metrics.jsonl") == kept(whole / "metrics.jsonl")
    assert train(c) == 0
    assert "at step 8 of 8; to go on raise --stages.2.steps" in capsys.readouterr().out


def test_damaged_checkpoints_lead_back_into_the_stage_before(staged, whole, monkeypatch, capsys):
    c = replace(staged, name="damaged", stages=STAGES[:2])
    shutil.copytree(whole, folder_of(c))
    for step in (8, 6, 4):
        for path in (folder_of(c) / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    broken_at(4, c, monkeypatch)
    out = capsys.readouterr().out
    assert all(f"checkpoint {step} is damaged, going back" in out for step in (8, 6, 4))
    assert out.index("damaged") < out.index("stage 1 of 2") < out.index("going on from step 3")
    before = [row for row in kept(whole / "metrics.jsonl") if row["step"] < 4]
    assert kept(folder_of(c) / "metrics.jsonl") == before


def test_a_signal_in_the_last_step_of_a_stage_does_not_begin_the_next(staged, monkeypatch, capsys):
    c, step = replace(staged, name="between"), Recorder.step

    def interrupted(self, at, metrics, flops):
        if at == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, at, metrics, flops)

    monkeypatch.setattr(Recorder, "step", interrupted)
    assert train(c) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 4, saved" in out
    assert "stage 2" not in out
    assert saved_steps(folder_of(c) / "checkpoints")[0] == 4


def with_stage(c, number, **values):
    stages = list(c.stages)
    stages[number - 1] = replace(stages[number - 1], **values)
    return replace(c, stages=tuple(stages))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: with_stage(c, 1, steps=5), r"stages.1.steps=5, but the run .* has 4: use --stages.1.steps 4, or"),
        (lambda c: with_stage(c, 1, batch_size=8), r"stages.1.batch_size=8, but .* has 4: use --stages.1.batch_size 4"),
        (lambda c: with_stage(c, 2, seq_len=64), r"stages.2.seq_len=64, but .* has 32: use --stages.2.seq_len 32"),
        (lambda c: with_stage(c, 1, seq_len=None), r"stages.1.seq_len=32, but .* has 16: use --stages.1.seq_len 16"),
        (lambda c: with_stage(c, 2, rope_theta=2.0), r"stages.2.rope_theta=2.0, but .* has 30000.0: use --stages.2.ro"),
        (lambda c: with_stage(c, 2, steps=1), r"stages.2.steps=1, but .* done 2 of stage 2: use --stages.2.steps 2 or"),
        (lambda c: replace(c, stages=STAGES[:1]), r"stages: there are 1, but the run in .* is in stage 2: put back"),
        (lambda c: replace(c, stages=(Stage(),)), r"stages: there are 1, but the run in .* is in stage 2: put back"),
        (lambda c: replace(c, train=replace(c.train, seed=5)), r"train.seed=5, but the run .* --train.seed 0"),
    ],
)
def test_refuses_other_stages_than_those_begun(staged, change, message):
    """Here the run is taken to be after two of the second stage's four steps."""
    c = replace(staged, name="begun")
    folder = folder_of(c)
    (folder / "checkpoints" / "6").mkdir(parents=True, exist_ok=True)
    config.save(c, folder / "config.json")
    check_resumable(c, folder)
    with pytest.raises(ValueError, match=message):
        check_resumable(change(c), folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: with_stage(c, 2, steps=2),
        lambda c: with_stage(c, 2, steps=9, learning_rate=0.5, data=1, context=8),
        lambda c: with_stage(c, 3, steps=9, seq_len=128, rope_theta=7.0),
        lambda c: replace(c, stages=STAGES[:2]),
        lambda c: replace(c, stages=(*STAGES, Stage(steps=1))),
    ],
)
def test_what_lies_ahead_may_change(staged, change):
    c = replace(staged, name="begun")
    folder = folder_of(c)
    (folder / "checkpoints" / "6").mkdir(parents=True, exist_ok=True)
    config.save(c, folder / "config.json")
    check_resumable(change(c), folder)


def test_a_stage_may_follow_a_finished_run_and_counts_its_own_tokens(base, capsys):
    c = replace(base, name="followed", train=replace(base.train, steps=1), log=replace(base.log, every=1))
    assert train(c) == 0
    followed = replace(c, stages=(Stage(), Stage(steps=2, seq_len=16, data=2, context=4)))
    assert train(followed) == 0
    assert "stage 2 of 2, steps 2 to 3: 2 rows of 16 tokens, a ring of 4" in capsys.readouterr().out
    rows = [row for row in read_rows(folder_of(c) / "metrics.jsonl") if "loss" in row]
    assert [(row["step"], row["stage"], row["tokens"]) for row in rows] == [(1, 1, 64), (2, 2, 96), (3, 2, 128)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"seq_len": 4096},
            r"^stage 3: the .* text holds .* of stages.3.seq_len=4096, fewer than stages.3.batch_size=1",
        ),
        ({"seq_len": 36}, r"^stage 3: stages.3.seq_len=36 must be a positive multiple of 2 \* context = 16"),
        ({"context": 3}, r"^stage 3: mesh data=1 x context=3 .* does not fit 8 devices: use --stages.3.\w+ \d"),
        (
            {"data": 8, "context": 1},
            r"^stage 3: stages.3.batch_size=1 must be a multiple of stages.3.data \* train.acc",
        ),
    ],
)
def test_a_later_stage_that_cannot_be_is_refused_before_the_first_begins(staged, values, message):
    c = with_stage(replace(staged, name="impossible"), 3, **values)
    with pytest.raises(ValueError, match=message):
        train(c)
    assert not folder_of(c).exists()
