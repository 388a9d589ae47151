"""Atomic file writes."""

import json
import os
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ringattn import config
from ringattn.runs.files import check_writable, write_bytes, write_figure, write_json, write_text


def test_a_write_leaves_no_temporary_file(tmp_path):
    write_text(tmp_path / "config.json", config.to_json(config.Config(name="new")))
    assert config.load(tmp_path / "config.json").name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_each_kind_of_content(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_text(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    write_json(path, {"a": [1, None]})
    assert path.read_bytes() == json.dumps({"a": [1, None]}, indent=2).encode() + b"\n"


def fail_to_replace(monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))


def fail_halfway(monkeypatch):
    def write_half(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_bytes", write_half)


@pytest.mark.parametrize("fail", [fail_halfway, fail_to_replace])
@pytest.mark.parametrize(("write", "content"), [(write_bytes, b"new"), (write_text, "new"), (write_json, {"new": 1})])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, fail, write, content):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fail(monkeypatch)
    with pytest.raises(OSError, match="no space"):
        write(path, content)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_keeps_nan(tmp_path):
    """A NaN result of an evaluation must not lose the others."""
    write_json(tmp_path / "file", {"loss": float("nan"), "tokens": 3})
    assert repr(json.loads((tmp_path / "file").read_text())) == "{'loss': nan, 'tokens': 3}"


def test_an_interrupted_figure_is_not_written(tmp_path, monkeypatch):
    path, save = tmp_path / "plots" / "loss.png", Figure.savefig

    def interrupted(self, target, **options):
        save(self, target, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_figure(path, Figure())
    assert not path.exists()  # otherwise a resumed run would keep half a plot
    monkeypatch.undo()
    write_figure(path, Figure())
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_writable_place_is_left_as_it_is(tmp_path):
    check_writable(tmp_path / "new", "--json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old", "--json")
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/plan.json", "directory {0}/none does not exist; create it first"),
        ("file/plan.json", "{0}/file is a file; use a path in a directory"),
        ("file/more/plan.json", "directory {0}/file/more does not exist"),
        ("directory", "--json {0}/directory is a directory; use a file name, such as {0}/directory/new.json"),
        ("/dev/null", "--json /dev/null is not a regular file"),
        ("x" * 300, "cannot write to {0} (File name too long); use another"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, path, message):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
        check_writable(tmp_path / path, "--json")


def test_a_directory_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write everywhere

        def refuse(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ValueError, match=r"cannot write to .*/locked \(Permission denied\); use another"):
        check_writable(tmp_path / "locked" / "plan.json", "--json")
