"""A run on video: its codebook, which a resumed run keeps, and its plot of frames."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_video import SIZE, film

from ringattn import config
from ringattn.data import VideoTokenizer, load_tokenizer
from ringattn.runs.metrics import read_rows
from ringattn.training import train
from ringattn.training.frames import plot_frames


def test_originals_are_plotted_above_reconstructions(tmp_path: Path):
    dark, bright = (np.full((3, *SIZE, 3), value, np.uint8) for value in (0, 200))
    bright[..., 1:] = 0  # red
    plot_frames(dark, bright, tmp_path / "plots" / "frames.png")
    image = matplotlib.image.imread(tmp_path / "plots" / "frames.png")[..., :3]
    half = len(image) // 2
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.1)
    assert red[half:].mean() > 0.3 > 0.01 > red[:half].mean()
    assert (image[:half].max(-1) < 0.1).mean() > 0.3


def test_no_frames_no_plot(tmp_path: Path):
    frames = np.zeros((0, *SIZE, 3), np.uint8)
    plot_frames(frames, frames, tmp_path / "frames.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> config.Config:
    directory = tmp_path_factory.mktemp("video")
    (directory / "a.mp4").write_bytes(film(50))
    return config.Config(
        name="film",
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(directory / "a.mp4"), tokenizer="video", frame_size=SIZE, seq_len=64, validation=0.2),
        mesh=config.Mesh(context=8),
        train=config.Train(steps=2, batch_size=2),
        validation=config.Validation(batches=1),
        log=config.Log(directory=str(directory / "runs")),
    )


@pytest.mark.slow
def test_a_run_on_video_writes_its_codebook_and_frames(run, monkeypatch):
    assert train(run) == 0
    directory = run.run_directory
    assert (directory / "plots" / "frames.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = load_tokenizer(str(directory / "codebook.npy"), SIZE)
    assert isinstance(tokenizer, VideoTokenizer)
    assert len(tokenizer.preview) == 2  # every eighth of ten held-out frames
    assert "eval/bits_per_byte" not in read_rows(directory / "metrics.jsonl")[-1]
    assert (directory / "samples.txt").read_text().startswith("=== 1: prompt\n")

    def refuse(*_):
        raise AssertionError("the run has a codebook, which must not be learned again")

    monkeypatch.setattr("ringattn.data.dataset.learn", refuse)
    assert train(run) == 0  # reads the data with the run's codebook; nothing is left to train
