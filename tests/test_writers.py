import importlib
import importlib.util
import json
import struct
from dataclasses import replace

import pytest

from ringattn import config
from ringattn.training.metrics import Screen
from ringattn.training.writers import Writers, check_packages

wandb = importlib.import_module("wandb")
events_of_tensorboard = importlib.import_module("tensorboardX.proto.event_pb2")
records_of_wandb = importlib.import_module("wandb.proto.wandb_internal_pb2")
ROW = {"step": 1, "loss": 2.5, "mfu": None}


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    """make_config(tensorboard=..., wandb=...): of a run in a folder of its own."""
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)

    def make(**log):
        return config.Config(name="small", log=config.Log(directory=str(tmp_path), **log))

    yield make
    wandb.teardown()


def events(folder):
    """What TensorBoard reads, file by file."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield events_of_tensorboard.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(folder):
    """(step, name, value) of what is left when each start has voided what lies beyond where it began."""
    kept = []
    for event in events(folder):
        if event.session_log.status == events_of_tensorboard.SessionLog.START:
            kept = [each for each in kept if each[0] < event.step]
        kept += [(event.step, each.tag, each.simple_value) for each in event.summary.value]
    return kept


def logged(content):
    """The records of a W&B file: 7 bytes, then pages of 32 KiB with pieces of records, as in LevelDB's logs."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # the rest of a page that holds no more
            place += -place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def records(folder):
    """(file's name, row) for each row that W&B's files have, once its service has written them."""
    wandb.teardown()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(records_of_wandb.Record.FromString, logged(path.read_bytes())):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield path.stem, {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items}


def test_tensorboard_goes_on_where_the_checkpoint_is(make_config):
    c = make_config(tensorboard=True)
    for after, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Writers(c, after, Screen(4, after)) as writers:
            for step in steps:
                writers.write(ROW | {"step": step, "loss": 10.0 * after + step, "eval/loss/0-63": 1.0})
    found = scalars(c.folder / "tensorboard")
    assert [(step, value) for step, name, value in found if name == "loss"] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert {name for _, name, _ in found} == {"loss", "eval/loss/0-63"}  # what is not known is not drawn


def test_wandb_is_offline_and_stays_the_same_run(make_config):
    c = make_config(wandb=True)
    for after, steps in ((0, (1, 2)), (2, (3,))):
        with Writers(c, after, Screen(4, after)) as writers:
            for step in steps:
                writers.write(ROW | {"step": step, "eval/loss": 0.5})
    found = list(records(c.folder))
    assert [(row["step"], row["loss"], row["eval/loss"]) for _, row in found] == [(n, 2.5, 0.5) for n in (1, 2, 3)]
    assert {name for name, _ in found} == {f"run-{(c.folder / 'wandb' / 'run_id').read_text()}"}


def test_a_writer_that_fails_is_left_out(make_config, capsys):
    c = make_config(tensorboard=True, wandb=True)
    with Writers(c, 0, Screen(4, 0)) as writers:
        writers.write(ROW)
        vars(writers._open["tensorboard"])["_file"].close()  # as if the disk were gone
        for step in (2, 3):
            writers.write(ROW | {"step": step})
    assert capsys.readouterr().out.count("tensorboard failed") == 1
    assert [row["step"] for _, row in records(c.folder)] == [1, 2, 3]


@pytest.mark.parametrize("field", ["tensorboard", "wandb"])
def test_one_that_cannot_be_opened_is_a_mistake_at_the_beginning_only(make_config, capsys, field):
    c = make_config(**{field: True})
    c.folder.mkdir()
    (c.folder / field).write_text("in the way")
    with pytest.raises(ValueError, match=rf"log.{field}=True, but it cannot be written .*: use --log.{field} False"):
        Writers(c, 0, Screen(4, 0))
    with Writers(c, 3, Screen(4, 3)) as writers:
        writers.write(ROW)
    assert f"{field} failed" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(make_config, monkeypatch, field):
    log = make_config(**{field: True}).log
    check_packages(log)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install 'ringattn\[{field}\]', or --log.{field} False"):
        check_packages(log)
    check_packages(replace(log, **{field: False}))
