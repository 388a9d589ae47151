"""Video tokenizer: scales frames, cuts them into patches and encodes each patch as the nearest code of a codebook.

This is vector quantization. `codebook` learns the codes with k-means from patches of the training frames.
"""

import hashlib
import importlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike

from ringattn.data.text_bytes import Aligned
from ringattn.data.tokenizer import check_ids
from ringattn.runs.files import check_regular, expanded
from ringattn.units import first_line

PATCH = 4
"""Width and height of a patch, in pixels."""
_FRAMES = 64  # frames in memory at a time

_log = logging.getLogger(__name__)


class VideoTokenizer:
    """One token per patch: frame by frame, in raster order within a frame.

    Args:
      codebook: [codes, PATCH, PATCH, 3] float32, RGB from 0 to 1.
      frame_size: height and width of scaled frames; multiples of PATCH.
      preview: [frames, height, width, 3] uint8, frames to plot next to their reconstruction.
    """

    name = "video"
    ignored_id = None

    def __init__(self, codebook: np.ndarray, frame_size: tuple[int, ...], preview: np.ndarray | None = None):
        self._codebook, self._frame_size = codebook, frame_size
        self.size: int = len(codebook) + 1
        self.boundary: int = len(codebook)
        self.start = self.boundary
        self.byte_lengths = np.zeros(self.size, np.int32)  # patches are not text, so the loss is reported only in nats
        self.unit: int = tokens_per_frame(frame_size)
        self.preview = np.zeros((0, *frame_size, 3), np.uint8) if preview is None else preview
        content = f"{frame_size}".encode() + np.ascontiguousarray(codebook, "<f4").tobytes()
        self.fingerprint: str = hashlib.sha256(content).hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        return {"codebook.npy": as_npy(self._codebook), "frames.npy": as_npy(self.preview)}

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [frames * unit] of a video file. Raises ValueError if it cannot be read."""
        ids = [nearest(patches(frames), self._codebook) for frames in read_frames(document, self._frame_size)]
        return np.concatenate(ids).astype(np.uint16 if self.size <= 2**16 else np.int32)

    def align(self, document: bytes) -> Aligned:
        return Aligned(self.encode(document))

    def frames(self, ids: ArrayLike) -> np.ndarray:
        """Returns the frames [n, height, width, 3] uint8 of `ids` [n * unit]. Raises ValueError for an invalid id."""
        codes = self._codebook[check_ids(ids, self.boundary).reshape(-1, self.unit)]
        pixels = rearrange(codes, "n (h w) p q c -> n (h p) (w q) c", h=self._frame_size[0] // PATCH)
        return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)

    def reconstruct_preview(self) -> np.ndarray:
        """Encodes and decodes the preview frames; the result has the same shape."""
        return self.frames(nearest(patches(self.preview), self._codebook))

    def decode(self, ids: ArrayLike) -> str:
        """Returns the codes as numbers, one line per row of patches. Raises ValueError for an invalid id."""
        checked = check_ids(ids, self.size)
        codes, columns = checked[checked != self.boundary], self._frame_size[1] // PATCH
        lines = (codes[start : start + columns] for start in range(0, codes.size, columns))
        return "\n".join(" ".join(f"{code:3}" for code in line) for line in lines)


def tokens_per_frame(frame_size: tuple[int, ...]) -> int:
    return frame_size[0] * frame_size[1] // PATCH**2


def read_frames(content: bytes, frame_size: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields the scaled frames of a video file in arrays [up to 64, height, width, 3] uint8.

    Raises ValueError if PyAV is missing, or if the file cannot be read or has no frame.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise ValueError("video requires the package PyAV; run pip install 'ringattn[video]'") from error
    height, width = frame_size
    pending: list[np.ndarray] = []
    count = declared = 0
    try:
        # Without this whitelist a malicious file could open other files or network addresses.
        with av.open(io.BytesIO(content), options={"protocol_whitelist": "none"}) as container:
            if not container.streams.video:
                raise ValueError("no video stream, only audio or text; use a video")
            declared = container.streams.video[0].frames
            for frame in container.decode(video=0):
                pending.append(_upright(frame, height, width))
                count += 1
                if len(pending) == _FRAMES:
                    yield np.stack(pending)
                    pending = []
    except av.error.FFmpegError as error:
        raise ValueError(f"PyAV cannot read this video ({error.strerror}); convert it, or copy it again") from error
    if pending:
        yield np.stack(pending)
    if not count:
        raise ValueError("the video has no frame; convert it, or copy it again")
    if count < declared:
        _log.warning("a video declares %d frames, but only %d can be read: it may be truncated", declared, count)


def _upright(frame: Any, height: int, width: int) -> np.ndarray:
    """Returns the scaled frame [height, width, 3] uint8, rotated by its metadata (phones record sideways)."""
    turns = round(frame.rotation / 90) % 4  # quarter turns, counterclockwise
    stored = (width, height) if turns % 2 else (height, width)
    return np.rot90(frame.to_ndarray(format="rgb24", height=stored[0], width=stored[1]), turns)


def patches(frames: np.ndarray) -> np.ndarray:
    """Cuts frames [n, height, width, 3] uint8 into patches [n * unit, PATCH * PATCH * 3] float32 from 0 to 1."""
    flat = rearrange(frames, "n (h p) (w q) c -> (n h w) (p q c)", p=PATCH, q=PATCH)
    return flat.astype(np.float32) / 255


def nearest(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Returns the indices [n] of the codes nearest to `points` [n, PATCH * PATCH * 3]."""
    codes = codebook.reshape(len(codebook), -1)
    half = 0.5 * np.square(codes).sum(1)
    chunks = [points[start : start + 8192] for start in range(0, len(points), 8192)]  # limits the distance matrix
    return np.concatenate([np.zeros(0, np.int64), *(np.argmin(half - chunk @ codes.T, 1) for chunk in chunks)])


def as_npy(array: np.ndarray) -> bytes:
    """Returns the content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def read_npy(path: Path) -> np.ndarray:
    """Reads the array of a .npy file, without unpickling. Raises ValueError with the name of the file."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("it is longer than its array")
            return array
    except Exception as error:  # NumPy parses the header as Python, which can raise any exception
        fix = "use another, or write it again"
        raise ValueError(f"{path} is not a readable .npy file ({first_line(error)}); {fix}") from error


def load_video(path: str, frame_size: tuple[int, ...]) -> VideoTokenizer:
    """Loads the codebook at `path`, and the preview frames of frames.npy in the same directory, if it exists.

    Raises ValueError if the file is not a codebook.
    """
    file = expanded(path)
    codebook = read_npy(file)
    if codebook.shape[1:] != (PATCH, PATCH, 3) or codebook.dtype != np.float32 or not len(codebook):
        content, rule = f"{codebook.dtype} {list(codebook.shape)}", f"float32 [codes, {PATCH}, {PATCH}, 3]"
        raise ValueError(f"data.tokenizer={path!r} is {content}, but must be {rule}; use the codebook.npy of a run")
    if not np.isfinite(codebook).all():
        raise ValueError(f"data.tokenizer={path!r} has non-finite codes; learn a codebook with --data.tokenizer video")
    file = file.with_name("frames.npy")
    preview = read_npy(file) if file.is_file() else None
    if preview is not None and (preview.dtype, preview.shape[1:]) != (np.uint8, (*frame_size, 3)):
        preview = None  # frames of another size; the codebook is valid for any size
    return VideoTokenizer(codebook, frame_size, preview)
