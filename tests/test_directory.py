"""The description of a run, and which configs can resume it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ringattn import config
from ringattn.config import Stage
from ringattn.runs.directory import check_data, check_resumable, write_description

STAGES = (
    Stage(steps=4, seq_len=16, batch_size=4, data=4, context=2),
    Stage(steps=4, seq_len=32, batch_size=2, data=2, context=4, rope_theta=30_000.0, learning_rate=1e-3),
    Stage(steps=3, seq_len=64, batch_size=1, data=1, context=8, rope_theta=100_000.0),
)
SINGLE = config.Config(
    model=config.Model(dim=16, heads=2, kv_heads=1, head_dim=8),
    data=config.Data(seq_len=32),
    train=config.Train(steps=6, batch_size=2),
)
STAGED = replace(SINGLE, stages=STAGES)


def begin(directory: Path, c: config.Config, step: int) -> Path:
    """Makes `directory` the run directory of `c`, with a checkpoint of `step`."""
    (directory / "checkpoints" / str(step)).mkdir(parents=True)
    write_description(directory, c, {}, {})
    return directory


def with_stage(c: config.Config, number: int, **values) -> config.Config:
    stages = list(c.stages)
    stages[number - 1] = replace(stages[number - 1], **values)
    return replace(c, stages=tuple(stages))


def test_the_description_is_that_of_the_run(tmp_path):
    launch, data = replace(STAGED, resume="must", profile="1:2"), {"training": "0a", "validation": "0b"}
    write_description(tmp_path / "runs" / "small", launch, data, {"tokenizer.json": b"{}"})
    directory = tmp_path / "runs" / "small"
    assert config.load(directory / "config.json") == STAGED
    assert json.loads((directory / "data.json").read_text()) == data
    assert json.loads((directory / "environment.json").read_text())["devices"]["count"] == 8
    assert (directory / "tokenizer.json").read_bytes() == b"{}"


def test_a_directory_that_cannot_be_written_is_an_error():
    with pytest.raises(ValueError, match=r"cannot write to /proc/none/small .*, or use another --log.directory"):
        write_description(Path("/proc/none/small"), SINGLE, {}, {})


def test_other_data_are_refused(tmp_path):
    (note,) = check_data(tmp_path, {"training": "0a"}, "text")
    assert note.endswith("data.json is missing: resuming without a check that the data are unchanged")
    write_description(tmp_path, SINGLE, {"training": "0a"}, {})
    assert check_data(tmp_path, {"training": "0a"}, "text") == []
    with pytest.raises(ValueError, match=r"data.path='text' has changed since the run .*; restore the data, or start"):
        check_data(tmp_path, {"training": "0b"}, "text")


@pytest.mark.parametrize("content", [b"", b"{}}", b"[]", b"\xff", b"[" * 100_000, 2**43])
def test_damaged_data_json_is_refused(tmp_path, content):
    if isinstance(content, int):
        with (tmp_path / "data.json").open("wb") as file:
            file.truncate(content)  # takes no space on the disk
    else:
        (tmp_path / "data.json").write_bytes(content)
    message = r"^\S*data.json cannot be read \(.+\); restore it, or remove it to continue without a check that"
    with pytest.raises(ValueError, match=message):
        check_data(tmp_path, {"training": "0a"}, "text")


@pytest.mark.parametrize("content", [None, b"", b"[]"])
def test_a_run_without_its_config_is_not_resumed(tmp_path, content):
    directory = begin(tmp_path, SINGLE, 3)
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    message = r"^\S*config.json.*; restore it, or copy the one that the same command writes with another --name$"
    with pytest.raises(ValueError, match=message):
        check_resumable(SINGLE, directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, resume="never"), r"resume='never', but .* has a checkpoint of step 3; .* another --name"),
        (lambda c: replace(c, train=replace(c.train, seed=5)), r"train.seed=5, but the run .* --train.seed 0"),
        (lambda c: replace(c, model=replace(c.model, dim=32)), r"model.dim=32, but the run .* --model.dim 16"),
        (
            lambda c: replace(c, data=replace(c.data, separate_documents=False)),
            r"data.separate_documents=False, but the run .* use --data.separate_documents True",
        ),
        (lambda c: replace(c, model=replace(c.model, window=9)), r"model.window=9, but .* use --model.window None"),
    ],
)
def test_fields_that_must_not_change(tmp_path, change, message):
    directory = begin(tmp_path, SINGLE, 3)
    check_resumable(SINGLE, directory)
    with pytest.raises(ValueError, match=message):
        check_resumable(change(SINGLE), directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, resume="must"),
        lambda c: replace(c, train=replace(c.train, steps=2)),  # the run is complete
        lambda c: replace(c, train=replace(c.train, steps=9, accumulate=2)),
        lambda c: replace(c, model=replace(c.model, dtype="bfloat16", remat="on")),
        lambda c: replace(c, attention=config.Attention(strategy="gather"), mesh=config.Mesh(context=4, data=2)),
    ],
)
def test_fields_that_may_change(tmp_path, change):
    check_resumable(change(SINGLE), begin(tmp_path, SINGLE, 3))


def test_a_run_without_checkpoint_can_only_be_started(tmp_path):
    for resume in ("auto", "never"):
        check_resumable(replace(SINGLE, resume=resume), tmp_path)
    with pytest.raises(ValueError, match=r"resume='must', but .* has no checkpoint; use --resume auto"):
        check_resumable(replace(SINGLE, resume="must"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: with_stage(c, 1, steps=5), r"stages.1.steps=5, but the run .* has 4; use --stages.1.steps 4, or"),
        (lambda c: with_stage(c, 1, batch_size=8), r"stages.1.batch_size=8, but .* has 4; use --stages.1.batch_size 4"),
        (lambda c: with_stage(c, 2, seq_len=64), r"stages.2.seq_len=64, but .* has 32; use --stages.2.seq_len 32"),
        (lambda c: with_stage(c, 1, seq_len=None), r"stages.1.seq_len=32, but .* has 16; use --stages.1.seq_len 16"),
        (lambda c: with_stage(c, 2, rope_theta=2.0), r"stages.2.rope_theta=2.0, but .* has 30000.0; use --stages.2.ro"),
        (lambda c: with_stage(c, 2, steps=1), r"stages.2.steps=1, but .* done 2 steps of stage 2; use --stages.2.st"),
        (lambda c: replace(c, stages=STAGES[:1]), r"stages: the config has 1, but the run .* in stage 2; restore"),
        (lambda c: replace(c, stages=(Stage(),)), r"stages: the config has 1, but the run .* in stage 2; restore"),
        (lambda c: replace(c, train=replace(c.train, seed=5)), r"train.seed=5, but the run .* --train.seed 0"),
    ],
)
def test_stages_that_have_started_must_not_change(tmp_path, change, message):
    """The run has completed two of the four steps of stage 2."""
    directory = begin(tmp_path, STAGED, 6)
    check_resumable(STAGED, directory)
    with pytest.raises(ValueError, match=message):
        check_resumable(change(STAGED), directory)


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
def test_stages_that_have_not_started_may_change(tmp_path, change):
    check_resumable(change(STAGED), begin(tmp_path, STAGED, 6))
