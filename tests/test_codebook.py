"""The codebook is learned from training frames only, deterministically."""

from pathlib import Path

import numpy as np
import pytest
from test_video import SIZE, film

from ringattn.config import Data
from ringattn.data import VideoTokenizer
from ringattn.data.codebook import CODES, Sample, learn
from ringattn.data.dataset import read
from ringattn.data.formats import Document
from ringattn.data.video import PATCH, nearest, patches, read_frames


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *SIZE, 3), np.uint8)


def test_kmeans_finds_the_means_of_separate_groups():
    groups = np.repeat(np.repeat(noise(20, 1)[:, :4, :4], SIZE[0] // 4, 1), SIZE[1] // 4, 2)
    jitter = np.random.default_rng(2).integers(-3, 4, (30, *groups.shape))
    sample = Sample()
    for shift in jitter:
        sample.add(np.clip(groups + shift, 0, 255).astype(np.uint8))
    codes = sample.codebook()
    assert codes.shape == (CODES, PATCH, PATCH, 3)
    points = patches(groups)
    distance = np.abs(points - codes.reshape(CODES, -1)[nearest(points, codes)]).mean()
    assert distance < 3 / 255  # the mean distance of a jittered patch


def test_few_patches_give_few_codes():
    sample = Sample()
    sample.add(np.repeat(noise(1)[:, :4, :4], 4, 1).repeat(6, 2)[:, : SIZE[0], : SIZE[1]])
    codes = sample.codebook()
    assert 1 <= len(codes) <= 24
    assert np.isfinite(codes).all()


def test_the_sample_has_a_fixed_size_and_is_uniform():
    sample = Sample()
    for value in range(8):
        sample.add(np.full((400, *SIZE, 3), 30 * value, np.uint8))
    points = sample._points
    assert len(points) == 16_384
    counts = np.bincount(np.rint(points[:, 0] * 255 / 30).astype(int), minlength=8)
    assert counts.min() > 0.85 * counts.mean()


def documents(*seeds: int) -> list[Document]:
    return [Document(f"{seed}.mp4", film(20, seed=seed)) for seed in seeds]


def test_the_codebook_is_learned_without_held_out_frames_which_are_the_preview():
    def learned(*films: Document) -> VideoTokenizer:
        return learn([lambda: iter(films)], SIZE, 0.3)

    films = documents(*range(6))
    several = learned(*films)
    # The two of six films with the smallest digests are held out.
    held_out = sorted(films, key=lambda film: film.digest)[:2]
    training = [film for film in films if film not in held_out]
    sample = Sample()
    for document in training:
        for frames in read_frames(document.content, SIZE):
            sample.add(frames)
    assert several.fingerprint == VideoTokenizer(sample.codebook(), SIZE).fingerprint
    first = next(film for film in films if film in held_out)
    assert np.array_equal(several.preview[0], next(read_frames(first.content, SIZE))[0])
    single = learned(*documents(3))
    frames = next(read_frames(documents(3)[0].content, SIZE))
    assert np.array_equal(single.preview, frames[14:][::8])
    sample = Sample()
    sample.add(frames[:14])
    assert VideoTokenizer(sample.codebook(), SIZE).fingerprint == single.fingerprint


def test_copies_of_a_video_count_once():
    films = documents(*range(3))
    alone, repeated = (learn([lambda each=each: iter(each)], SIZE, 0.3) for each in (films, [*films, *films]))
    assert repeated.fingerprint == alone.fingerprint
    twice = learn([lambda: iter(films), lambda: iter(films)], SIZE, 0.3)
    assert twice.fingerprint == alone.fingerprint


def test_the_codebook_is_learned_without_the_held_out_end_of_one_of_several_videos(tmp_path: Path):
    films = documents(0, 1, 2)
    learned = learn([lambda: iter(films)], SIZE, 0.05)
    first = min(films, key=lambda film: film.digest)
    sample = Sample()
    for document in films:
        frames = next(read_frames(document.content, SIZE))
        sample.add(frames[:17] if document is first else frames)
    assert learned.fingerprint == VideoTokenizer(sample.codebook(), SIZE).fingerprint
    for each in films:
        (tmp_path / each.name).write_bytes(each.content)
    splits = read(Data(path=str(tmp_path), tokenizer="video", frame_size=SIZE, validation=0.05))
    assert splits.tokenizer.fingerprint == learned.fingerprint
    assert splits.validation[0].lengths.tolist() == [3 * splits.tokenizer.unit]


def test_an_unreadable_video_is_named():
    with pytest.raises(ValueError, match=r"bad.mp4: PyAV cannot read this video"):
        learn([lambda: iter([*documents(0, 1), Document("bad.mp4", b"bad")])], SIZE, 0.3)


def test_a_single_video_is_split_at_a_frame_deterministically(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(film(50))
    data = Data(path=str(tmp_path / "a.mp4"), tokenizer="video", frame_size=SIZE, validation=0.1)
    one, again = read(data), read(data)
    assert one.training[0].count == 1 + 45 * one.tokenizer.unit
    assert one.validation[0].count == 5 * one.tokenizer.unit
    assert one.training[0].fingerprint == again.training[0].fingerprint
    assert isinstance(one.tokenizer, VideoTokenizer)
    assert np.abs(one.tokenizer.reconstruct_preview().astype(float) - one.tokenizer.preview).mean() < 5


def test_the_codebook_of_the_run_directory_is_used(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(film(50))
    data = Data(path=str(tmp_path / "a.mp4"), tokenizer="video", frame_size=SIZE)
    saved = VideoTokenizer(np.zeros((9, PATCH, PATCH, 3), np.float32), SIZE)
    for name, content in saved.files.items():
        (tmp_path / name).write_bytes(content)
    assert read(data, tmp_path).tokenizer.fingerprint == saved.fingerprint != read(data).tokenizer.fingerprint
