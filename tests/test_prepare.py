"""Shards from a source: written once, then there; video with its codebook."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_video import SIZE, film

from ringattn.config import Data
from ringattn.data import VideoTokenizer, prepare
from ringattn.data.reading import read


@pytest.fixture
def genome(tmp_path: Path) -> Data:
    (tmp_path / "g.fa").write_bytes(b">a\n" + b"ACGTTGCA" * 500)
    return Data(path=str(tmp_path / "g.fa"), tokenizer="dna", seq_len=32)


def test_says_what_it_wrote_and_then_that_it_is_there(genome: Data, tmp_path: Path, capsys: pytest.CaptureFixture):
    prepare(genome, str(tmp_path / "out" / "s"))
    assert "out/s: 0.0 MB read, 4,001 tokens, " in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "s").iterdir()}
    assert set(before) == {"index.json", "documents.npy", "shard-00000.bin"}
    prepare(genome, str(tmp_path / "out" / "s"))
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "s").iterdir()} == before


def test_what_it_must_not_write_over_is_refused(genome: Data, tmp_path: Path):
    prepare(genome, str(tmp_path / "s"))
    (tmp_path / "other.fa").write_bytes(b">a\nACGT\n")
    with pytest.raises(ValueError, match=r"s holds shards of '.*g.fa': choose another --output"):
        prepare(replace(genome, path=str(tmp_path / "other.fa")), str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"data.tokenizer='bytes', but .*: use --data.tokenizer dna"):
        prepare(replace(genome, tokenizer="bytes"), str(tmp_path / "s"))
    (tmp_path / "text").mkdir()
    with pytest.raises(ValueError, match=r"text is there already, and holds no shards: choose another --output"):
        prepare(genome, str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"holds shards already: give it to scripts/train.py"):
        prepare(replace(genome, path=str(tmp_path / "s")), str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"names several: write each to a folder of its own"):
        prepare(replace(genome, path=("a", "b")), str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"lies inside data.path=.*: choose a folder beside it"):
        prepare(replace(genome, path=str(tmp_path)), str(tmp_path / "u"))
    with pytest.raises(ValueError, match="must name a folder"):
        prepare(genome, "/")
    (tmp_path / "s" / "shard-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-00000.bin has 0 bytes instead of 4002"):
        prepare(genome, str(tmp_path / "s"))


def test_video_takes_its_codebook_and_frames_along(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(film(40))
    data = Data(path=str(tmp_path / "a.mp4"), tokenizer="video", frame_size=SIZE, validation=0.2)
    prepare(data, str(tmp_path / "s"))
    prepare(data, str(tmp_path / "s"))
    of_shards, of_film = read(replace(data, path=str(tmp_path / "s"))), read(data)
    assert isinstance(of_shards.tokenizer, VideoTokenizer)
    assert isinstance(of_film.tokenizer, VideoTokenizer)
    assert of_shards.tokenizer.fingerprint == of_film.tokenizer.fingerprint
    assert np.array_equal(of_shards.tokenizer.look, of_film.tokenizer.look)
    assert of_shards.validation[0].count == of_film.validation[0].count == 8 * 24
    with pytest.raises(ValueError, match=r"was learned with 0.2 held out: use --data.validation 0.2"):
        read(replace(data, path=str(tmp_path / "s"), validation=0.1))
    with pytest.raises(ValueError, match=r"holds tokens of another one of that kind"):
        read(replace(data, path=str(tmp_path / "s"), frame_size=(32, 48)))
    both = read(replace(data, path=(str(tmp_path / "s"), str(tmp_path / "a.mp4")), mixture=(1.0, 1.0)))
    assert both.training[0].count == both.training[1].count
    (tmp_path / "s" / "codebook.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"codebook.npy has 0 bytes instead of"):
        read(replace(data, path=str(tmp_path / "s")))


def test_shards_of_text_are_no_video(tmp_path: Path):
    (tmp_path / "t.txt").write_text("text")
    prepare(Data(path=str(tmp_path / "t.txt")), str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"holds no video: use the --data.tokenizer that its shards were made with"):
        read(Data(path=str(tmp_path / "s"), tokenizer="video"))
