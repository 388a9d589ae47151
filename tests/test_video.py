"""Video files written by PyAV are encoded to tokens and decoded to frames."""

import importlib
import io
import logging
import os
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest

from ringattn.data import Tokenizer, load_tokenizer
from ringattn.data.video import PATCH, VideoTokenizer, as_npy, load_video, nearest, patches, read_frames

SIZE = (16, 24)


def film(frames: int, size: tuple[int, int] = (64, 96), seed: int = 0) -> bytes:
    """Returns an mp4 of a bright square that moves over a background, whose color depends on `seed`."""
    height, width = size
    with (
        tempfile.TemporaryDirectory() as directory
    ):  # on disk, because faststart moves the index to the beginning of the file
        path = Path(directory) / "film.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(frames):
                image = np.full((height, width, 3), np.random.default_rng(seed).integers(20, 120, 3), np.uint8)
                at = 2 * number % (width - 16)
                image[16:32, at : at + 16] = 230
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return path.read_bytes()


def codebook(codes: int) -> np.ndarray:
    """Returns uniform gray patches."""
    gray = np.linspace(0, 1, codes, dtype=np.float32)
    return np.broadcast_to(gray[:, None, None, None], (codes, PATCH, PATCH, 3)).copy()


def test_frames_are_read_and_scaled():
    chunks = list(read_frames(film(70), SIZE))
    assert [chunk.shape for chunk in chunks] == [(64, *SIZE, 3), (6, *SIZE, 3)]
    assert chunks[0].dtype == np.uint8
    first = chunks[0][0].mean(-1)
    assert first[4:8, :4].mean() > 180 > 130 > first[12:].mean()  # the square, scaled by four


def test_tokens_are_patches_row_by_row_and_decode_to_the_frames():
    tokenizer = VideoTokenizer(codebook(256), SIZE)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.size, tokenizer.boundary, tokenizer.unit) == (257, 256, 24)
    frames = np.repeat(np.arange(48, dtype=np.uint8).reshape(2, 4, 6), 4, 1).repeat(4, 2)[..., None].repeat(3, -1)
    ids = nearest(patches(frames), codebook(256))
    assert ids.tolist() == list(range(48))
    assert np.array_equal(tokenizer.frames(ids), frames)
    assert tokenizer.decode([256, *range(7)]) == "  0   1   2   3   4   5\n  6"
    assert not tokenizer.byte_lengths[ids].any()


def test_a_video_is_encoded_as_the_tokens_of_its_frames():
    tokenizer, content = VideoTokenizer(codebook(256), SIZE), film(70)
    ids = tokenizer.encode(content)
    assert ids.dtype == np.uint16
    assert ids.size == 70 * tokenizer.unit
    original = np.concatenate(list(read_frames(content, SIZE))).astype(float).mean(-1)
    decoded = tokenizer.frames(ids).astype(float)[..., 0]
    flat = original.reshape(70, 4, PATCH, 6, PATCH).mean((2, 4)).repeat(PATCH, 1).repeat(PATCH, 2)
    assert np.abs(decoded - flat).mean() < 3  # the nearest gray is the mean of the patch


@pytest.mark.parametrize("content", [b"", b"no video" * 100, film(30)[:400]])
def test_an_invalid_video_raises(content: bytes):
    with pytest.raises(ValueError, match=r"PyAV cannot read this video \(.*\); convert it"):
        list(read_frames(content, SIZE))


def test_a_truncated_video_is_read_to_its_end_with_a_warning(caplog: pytest.LogCaptureFixture):
    whole = film(70)
    with caplog.at_level(logging.WARNING):
        assert sum(map(len, read_frames(whole, SIZE))) == 70
        assert not caplog.records
        count = sum(map(len, read_frames(whole[: len(whole) * 7 // 10], SIZE)))
    assert 30 < count < 70
    assert f"a video declares 70 frames, but only {count} can be read" in caplog.text


def test_audio_without_video_raises():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream, only audio"):
        list(read_frames(file.getvalue(), SIZE))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"pip install 'ringattn\[video\]'"):
        list(read_frames(b"", SIZE))


def test_a_codebook_round_trips_through_its_files(tmp_path: Path):
    preview = np.random.default_rng(0).integers(0, 255, (3, *SIZE, 3), np.uint8)
    tokenizer = VideoTokenizer(codebook(30), SIZE, preview)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(str(tmp_path / "codebook.npy"), SIZE)
    assert isinstance(again, VideoTokenizer)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.preview, preview)
    assert again.reconstruct_preview().shape == preview.shape
    other = load_tokenizer(str(tmp_path / "codebook.npy"), (32, 48))
    assert other.fingerprint != tokenizer.fingerprint
    assert isinstance(other, VideoTokenizer)
    assert len(other.preview) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable .npy file"),
        (b"PK\x03\x04", "is not a readable .npy file"),
        (b"\x93NUMPY\x01\x00", "is not a readable .npy file"),
        (as_npy(np.zeros((3, 4, 4, 3))), r"is float64 \[3, 4, 4, 3\], but must be float32"),
        (as_npy(np.zeros((0, 4, 4, 3), np.float32)), r"is float32 \[0, 4, 4, 3\], but must"),
        (as_npy(np.full((2, 4, 4, 3), np.nan, np.float32)), "has non-finite codes"),
    ],
)
def test_an_invalid_codebook_raises(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "codebook.npy").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / "codebook.npy"), SIZE)


def test_a_pipe_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "codebook.npy")
    with pytest.raises(
        ValueError, match=r"is not a readable .npy file \(.* is a pipe or a device, not a regular file\)"
    ):
        load_tokenizer(str(tmp_path / "codebook.npy"), SIZE)


def test_a_pickle_in_a_codebook_is_not_loaded(tmp_path: Path):
    np.save(tmp_path / "codebook.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"is not a readable .npy file"):
        load_tokenizer(str(tmp_path / "codebook.npy"), SIZE)


def test_a_codebook_with_one_flipped_bit_in_its_header_is_refused(tmp_path: Path):
    codes = np.random.default_rng(0).random((64, PATCH, PATCH, 3), np.float32)
    content, path, messages = bytearray(as_npy(codes)), tmp_path / "codebook.npy", []
    header = len(content) - codes.nbytes
    for bit in range(8 * header):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            load_video(str(path), SIZE)
        except ValueError as error:
            messages.append(str(error))
        else:  # a blank of the padding has become another blank
            np.testing.assert_array_equal(np.load(path), codes)
    assert len(messages) > 0.9 * 8 * header
    assert all(str(path) in message and "\n" not in message for message in messages)
