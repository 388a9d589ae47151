"""Shards of a source are written once, then verified; shards of video include the codebook."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_video import SIZE, film

from ringattn.config import Data
from ringattn.data import VideoTokenizer, prepare
from ringattn.data.dataset import read
from ringattn.runs.lock import locked


@pytest.fixture
def genome(tmp_path: Path) -> Data:
    (tmp_path / "g.fa").write_bytes(b">a\n" + b"ACGTTGCA" * 500)
    return Data(path=str(tmp_path / "g.fa"), tokenizer="dna", seq_len=32)


def test_reports_its_output_and_has_nothing_to_do_the_second_time(
    genome: Data, tmp_path: Path, capsys: pytest.CaptureFixture
):
    prepare(genome, str(tmp_path / "out" / "s"))
    assert "out/s: 0.0 MB read, 4,001 tokens, " in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "s").iterdir()}
    assert set(before) == {"index.json", "documents.npy", "text_bytes.npy", "shard-00000.bin"}
    prepare(genome, str(tmp_path / "out" / "s"))
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "s").iterdir()} == before


def test_shards_that_another_process_writes_are_not_written_again(
    genome: Data, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    with locked(tmp_path / ".s.lock", tmp_path / "s", "", ""):
        in_use = rf"^{tmp_path}/s is in use by process {os.getpid()} on .* or choose another --output$"
        with pytest.raises(ValueError, match=in_use):
            prepare(genome, str(tmp_path / "s"))
        assert {path.name for path in tmp_path.iterdir()} == {"g.fa", ".s.lock"}

    def locked_after_another(*args):
        monkeypatch.undo()
        prepare(genome, str(tmp_path / "s"))
        return locked(*args)

    monkeypatch.setattr(sys.modules["ringattn.data.prepare"], "locked", locked_after_another)
    prepare(genome, str(tmp_path / "s"))
    assert "nothing to do" in capsys.readouterr().out


def test_prints_progress_lines_without_a_terminal(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys.modules["ringattn.data.prepare"], "_INTERVAL", 0.0)
    (tmp_path / "t.jsonl").write_text('{"text": "some text"}\n' * 2)
    prepare(Data(path=str(tmp_path / "t.jsonl")), str(tmp_path / "s"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" tokens, ")[0] for line in lines] == [
        "0.0 of 0.0 MB read, 10",
        "0.0 of 0.0 MB read, 20",
        f"{tmp_path}/s: 0.0 MB read, 20",
    ]


def test_refuses_to_overwrite_and_other_bad_outputs(genome: Data, tmp_path: Path):
    prepare(genome, str(tmp_path / "s"))
    (tmp_path / "other.fa").write_bytes(b">a\nACGT\n")
    with pytest.raises(ValueError, match=r"s contains shards of data.path='.*g.fa'; choose another --output"):
        prepare(replace(genome, path=str(tmp_path / "other.fa")), str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"data.tokenizer='bytes', but .*; use --data.tokenizer dna"):
        prepare(replace(genome, tokenizer="bytes"), str(tmp_path / "s"))
    (tmp_path / "text").mkdir()
    with pytest.raises(ValueError, match=r"text exists but contains no shards; choose another --output"):
        prepare(genome, str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"already contains shards; pass it to scripts/train.py"):
        prepare(replace(genome, path=str(tmp_path / "s")), str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"must be a single path; write each path to its own directory"):
        prepare(replace(genome, path=("a", "b")), str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"is inside data.path=.*; choose a directory outside"):
        prepare(replace(genome, path=str(tmp_path)), str(tmp_path / "u"))
    with pytest.raises(ValueError, match="must name a directory"):
        prepare(genome, "/")
    (tmp_path / "s" / "shard-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-00000.bin has 0 bytes instead of 4002"):
        prepare(genome, str(tmp_path / "s"))


def test_shards_of_video_contain_codebook_and_preview_frames(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(film(40))
    data = Data(path=str(tmp_path / "a.mp4"), tokenizer="video", frame_size=SIZE, validation=0.2)
    prepare(data, str(tmp_path / "s"))
    prepare(data, str(tmp_path / "s"))
    from_shards, from_video = read(replace(data, path=str(tmp_path / "s"))), read(data)
    assert isinstance(from_shards.tokenizer, VideoTokenizer)
    assert isinstance(from_video.tokenizer, VideoTokenizer)
    assert from_shards.tokenizer.fingerprint == from_video.tokenizer.fingerprint
    assert np.array_equal(from_shards.tokenizer.preview, from_video.tokenizer.preview)
    assert from_shards.validation[0].count == from_video.validation[0].count == 8 * 24
    with pytest.raises(ValueError, match=r"data.validation=0.1 must be 0.2, .*; use --data.validation 0.2"):
        read(replace(data, path=str(tmp_path / "s"), validation=0.1))
    with pytest.raises(
        ValueError, match=r"has tokens of another tokenizer of kind 'video'; use --data.tokenizer .*codebook.npy"
    ):
        read(replace(data, path=str(tmp_path / "s"), frame_size=(32, 48)))
    both = read(replace(data, path=(str(tmp_path / "s"), str(tmp_path / "a.mp4"))))
    assert [corpus.count for corpus in both.training] == [from_video.training[0].count]  # the film is used once
    (tmp_path / "s" / "codebook.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"codebook.npy has 0 bytes instead of"):
        read(replace(data, path=str(tmp_path / "s")))


def test_shards_of_text_have_no_video(tmp_path: Path):
    (tmp_path / "t.txt").write_text("text")
    prepare(Data(path=str(tmp_path / "t.txt")), str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"has no video; use the --data.tokenizer that its shards were written with"):
        read(Data(path=str(tmp_path / "s"), tokenizer="video"))
