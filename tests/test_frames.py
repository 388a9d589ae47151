"""A run on video: its codebook, its frames before and after, and that it goes on with the codebook it has."""

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_video import SIZE, film

from ringattn import config
from ringattn.data import VideoTokenizer, load_tokenizer
from ringattn.training import train
from ringattn.training.frames import plot_frames
from ringattn.training.metrics import read_rows


def test_both_are_drawn_one_above_the_other(tmp_path: Path):
    dark, bright = (np.full((3, *SIZE, 3), value, np.uint8) for value in (0, 200))
    bright[..., 1:] = 0  # red
    plot_frames(dark, bright, tmp_path / "plots" / "frames.png")
    image = matplotlib.image.imread(tmp_path / "plots" / "frames.png")[..., :3]
    half = len(image) // 2
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.1)
    assert red[half:].mean() > 0.3 > 0.01 > red[:half].mean()
    assert (image[:half].max(-1) < 0.1).mean() > 0.3


def test_of_no_frames_nothing_is_drawn(tmp_path: Path):
    nothing = np.zeros((0, *SIZE, 3), np.uint8)
    plot_frames(nothing, nothing, tmp_path / "frames.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> config.Config:
    folder = tmp_path_factory.mktemp("video")
    (folder / "a.mp4").write_bytes(film(50))
    return config.Config(
        name="film",
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(folder / "a.mp4"), tokenizer="video", frame_size=SIZE, seq_len=64, validation=0.2),
        mesh=config.Mesh(context=8),
        train=config.Train(steps=2, batch_size=2),
        evaluate=config.Evaluate(batches=1),
        log=config.Log(directory=str(folder / "runs")),
    )


def test_a_run_on_video_leaves_its_codebook_and_frames(run, monkeypatch):
    assert train(run) == 0
    folder = Path(run.log.directory) / run.name
    assert (folder / "plots" / "frames.png").read_bytes().startswith(b"\x89PNG")
    kept = load_tokenizer(str(folder / "codebook.npy"), SIZE)
    assert isinstance(kept, VideoTokenizer)
    assert len(kept.look) == 2  # of ten held-out frames, every eighth
    assert "eval/bits_per_byte" not in read_rows(folder / "metrics.jsonl")[-1]
    assert (folder / "samples.txt").read_text().startswith("=== 1: given\n")

    def forget(*_):
        raise AssertionError("the codebook is there and need not be learned")

    monkeypatch.setattr("ringattn.data.reading.learn", forget)
    assert train(replace(run, train=replace(run.train, steps=3))) == 0
