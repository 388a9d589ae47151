"""TensorBoard and W&B writers: their files are read back."""

import importlib
import importlib.util
import json
import struct
from dataclasses import replace

import pytest

from ringattn import config
from ringattn.runs.progress import Display
from ringattn.runs.writers import Writers, check_packages

wandb = importlib.import_module("wandb")
tensorboard_events = importlib.import_module("tensorboardX.proto.event_pb2")
wandb_records = importlib.import_module("wandb.proto.wandb_internal_pb2")
ROW = {"step": 1, "loss": 2.5, "mfu": None}


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    """make_config(tensorboard=..., wandb=...): the config of a run in an empty directory."""
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)

    def make(**log):
        return config.Config(name="small", log=config.Log(directory=str(tmp_path), **log))

    yield make
    wandb.teardown()


def events(directory):
    """The events of all files, parsed as TensorBoard does."""
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield tensorboard_events.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(directory):
    """(step, name, value) of the scalars that TensorBoard shows: a session start hides later steps before it."""
    shown = []
    for event in events(directory):
        if event.session_log.status == tensorboard_events.SessionLog.START:
            shown = [scalar for scalar in shown if scalar[0] < event.step]
        shown += [(event.step, each.tag, each.simple_value) for each in event.summary.value]
    return shown


def parse_records(content):
    """The records of a W&B file: 7 bytes, then pages of 32 KiB with pieces of records, as in LevelDB's logs."""
    offset, record = 7, b""
    while offset + 7 <= len(content):
        if 2**15 - offset % 2**15 < 7:  # padding at the end of a page
            offset += -offset % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def records(directory):
    """(file name, row) for each row of W&B's files, after its service has written them."""
    wandb.teardown()
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in map(wandb_records.Record.FromString, parse_records(path.read_bytes())):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield path.stem, {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items}


def test_tensorboard_continues_from_the_checkpoint(make_config):
    c = make_config(tensorboard=True)
    for after, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Writers(c, after, Display(4, after)) as writers:
            for step in steps:
                writers.write(ROW | {"step": step, "loss": 10.0 * after + step, "eval/loss/0-63": 1.0})
    written = scalars(c.run_directory / "tensorboard")
    assert [(step, value) for step, name, value in written if name == "loss"] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert {name for _, name, _ in written} == {"loss", "eval/loss/0-63"}  # not the unknown mfu


def test_wandb_is_offline_and_continues_the_same_run(make_config):
    c = make_config(wandb=True)
    for after, steps in ((0, (1, 2)), (2, (3,))):
        with Writers(c, after, Display(4, after)) as writers:
            for step in steps:
                writers.write(ROW | {"step": step, "eval/loss": 0.5})
    written = list(records(c.run_directory))
    assert [(row["step"], row["loss"], row["eval/loss"]) for _, row in written] == [(n, 2.5, 0.5) for n in (1, 2, 3)]
    assert {name for name, _ in written} == {f"run-{(c.run_directory / 'wandb' / 'run_id').read_text()}"}


def test_a_failing_writer_is_dropped(make_config, capsys):
    c = make_config(tensorboard=True, wandb=True)
    with Writers(c, 0, Display(4, 0)) as writers:
        writers.write(ROW)
        vars(writers._writers["tensorboard"])["_file"].close()  # as if the disk had failed
        for step in (2, 3):
            writers.write(ROW | {"step": step})
    assert capsys.readouterr().out.count("tensorboard failed") == 1
    assert [row["step"] for _, row in records(c.run_directory)] == [1, 2, 3]


@pytest.mark.parametrize("field", ["tensorboard", "wandb"])
def test_a_writer_that_cannot_be_opened_is_an_error_only_at_the_start_of_a_run(make_config, capsys, field):
    c = make_config(**{field: True})
    c.run_directory.mkdir()
    (c.run_directory / field).write_text("in the way")
    with pytest.raises(ValueError, match=rf"log.{field}=True, but it cannot be written .*; use --log.{field} False"):
        Writers(c, 0, Display(4, 0))
    with Writers(c, 3, Display(4, 3)) as writers:
        writers.write(ROW)
    assert f"{field} failed" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["tensorboard", "wandb"])
def test_a_missing_package_is_an_error(make_config, monkeypatch, field):
    log = make_config(**{field: True}).log
    check_packages(log)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install 'ringattn\[{field}\]', or use --log.{field} False"):
        check_packages(log)
    check_packages(replace(log, **{field: False}))
