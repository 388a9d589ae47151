import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringattn import config
from ringattn.training import train
from ringattn.training.checkpoint import saved_steps
from ringattn.training.metrics import MetricsFile, Recorder, read_rows

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
    assert list(rows[0])[5:] == ["tokens_per_second", "step_seconds", "mfu", "peak_bytes", "flops_per_token"]
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
