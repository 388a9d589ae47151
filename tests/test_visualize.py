"""The committed pictures, the figures as text, and `python -m ringattn.visualize`."""

import runpy
import sys
from pathlib import Path

import pytest

from ringattn.attn.mask import Mask
from ringattn.visualize import Row, animate, balance_text, draw, memory_text, schedule_text

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "picture", "flag"), [("ring", draw, ""), ("ring_animated", animate, " --animate")])
def test_the_committed_pictures_are_up_to_date(name, picture, flag):
    committed = (ROOT / "notebooks" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == picture(), f"draw it again: python -m ringattn.visualize notebooks/images/{name}.svg{flag}"


def test_schedule_and_balance_as_text():
    first = schedule_text(3).splitlines()[1]
    assert first.split() == ["device", "0", "K/V", "0", "##....", "K/V", "2", "##..##", "K/V", "1", "######"]
    text = balance_text(Row(64, 4, mask=Mask(window=(16, 0)))).splitlines()
    assert text[3].split() == ["device", "1", "53.1%", "53.1%", "-", "-"]
    assert text[-1].startswith("max/mean 1.14: ")


def test_memory_as_text():
    curves = {"dense": {2**14: 2**37, 2**16: 2**41}, "ring": {2**14: 2**27, 2**16: 2**29}}
    lines = [line.split() for line in memory_text(curves | {"gather": {2**14: 1000, 2**18: 16_000}}).splitlines()]
    assert lines[1] == ["tokens", "dense", "ring", "gather"]
    assert lines[2] == ["16,384", "128", "GiB", "128", "MiB", "1,000", "bytes"]
    assert lines[3] == ["65,536", "2", "TiB", "512", "MiB"]
    assert lines[4] == ["262,144", "15.62", "KiB"]
    assert lines[5] == ["per", "doubling", "x", "4.00", "x", "2.00", "x", "2.00"]
    one_point = memory_text({"ring": {2: 1024}}, "devices").splitlines()
    assert one_point[1].split() == ["devices", "ring"]
    assert one_point[-1].split() == ["per", "doubling", "-"]


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["visualize", *map(str, words)])
        runpy.run_module("ringattn.visualize", run_name="__main__")

    command(tmp_path / "new" / "ring.svg", "--devices", 5, "--animate")
    assert (tmp_path / "new" / "ring.svg").read_text(encoding="utf-8") == animate(5)
    command("--layout", "zigzag")
    assert capsys.readouterr().out.startswith(schedule_text(4, "zigzag"))
    with pytest.raises(SystemExit):
        command("--animate")

    def planned(lengths, devices, layout):
        return {f"{layout} on {devices}": {length: length * 2**20 for length in lengths}}

    monkeypatch.setattr("ringattn.visualize.memory_curves", planned)
    command("--memory", "--devices", 8, "--layout", "striped")
    shown = capsys.readouterr().out
    assert "striped on 8" in shown
    assert "1,048,576" in shown
    with pytest.raises(SystemExit):
        command("ring.svg", "--memory")
