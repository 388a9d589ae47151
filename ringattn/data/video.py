"""Video as tokens: frames are scaled, cut into patches, and each patch becomes the most similar one of a codebook.

The codebook is learned by k-means from patches of the training frames; "vector quantisation" in its oldest form.
"""

import hashlib
import importlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ringattn.data.tokenizer import check_ids

PATCH = 4
"""Width and height of a patch, in pixels."""
_TOGETHER = 64  # frames in memory at a time

_log = logging.getLogger(__name__)


class VideoTokenizer:
    """Every patch of a frame is a token: frame after frame, and in a frame line by line.

    Args:
      codebook: [codes, PATCH, PATCH, 3] float32, red, green and blue from 0 to 1.
      frame_size: height and width to which frames are scaled; multiples of PATCH.
      look: [frames, height, width, 3] uint8, a few frames to show beside what tokens make of them.
    """

    name = "video"
    unlearned = None

    def __init__(self, codebook: np.ndarray, frame_size: tuple[int, ...], look: np.ndarray | None = None):
        self._codebook, self._frame_size = codebook, frame_size
        self.size: int = len(codebook) + 1
        self.boundary: int = len(codebook)
        self.unit: int = frame_size[0] * frame_size[1] // PATCH**2
        self.look = np.zeros((0, *frame_size, 3), np.uint8) if look is None else look
        content = f"{frame_size}".encode() + np.ascontiguousarray(codebook, "<f4").tobytes()
        self.fingerprint: str = hashlib.sha256(content).hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        return {"codebook.npy": as_npy(self._codebook), "frames.npy": as_npy(self.look)}

    def encode(self, document: bytes) -> np.ndarray:
        """Ids [frames * unit] uint16 of a video file. Raises ValueError if it cannot be read."""
        parts = [nearest(patches(frames), self._codebook) for frames in read_frames(document, self._frame_size)]
        return np.concatenate(parts).astype(np.uint16 if self.size <= 2**16 else np.int32)

    def frames(self, ids: ArrayLike) -> np.ndarray:
        """The frames [n, height, width, 3] uint8 that whole frames of ids stand for; ValueError for other ids."""
        checked = check_ids(ids, self.boundary).reshape(-1, self.unit)
        height, width = (side // PATCH for side in self._frame_size)
        tiles = self._codebook[checked].reshape(-1, height, width, PATCH, PATCH, 3)
        pixels = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self._frame_size, 3)
        return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)

    def rebuilt(self) -> np.ndarray:
        """What tokens make of the frames to look at: of the same shape."""
        return self.frames(nearest(patches(self.look), self._codebook))

    def decode(self, ids: ArrayLike) -> str:
        """The codes as numbers, in lines of a patch row's length; ValueError for an id outside the vocabulary."""
        checked = check_ids(ids, self.size)
        codes, across = checked[checked != self.boundary], self._frame_size[1] // PATCH
        lines = (codes[at : at + across] for at in range(0, codes.size, across))
        return "\n".join(" ".join(f"{code:3}" for code in line) for line in lines)

    def byte_length(self, ids: ArrayLike) -> int:
        """0: a patch is no text, so that its loss is given in nats alone."""
        return 0


def read_frames(content: bytes, frame_size: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The frames of a video file, scaled: arrays [up to 64, height, width, 3] uint8.

    Raises ValueError if PyAV is missing, or if the file cannot be read or holds no frame.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise ValueError("video needs the library PyAV: pip install 'ringattn[video]'") from error
    height, width = frame_size
    pending: list[np.ndarray] = []
    count = promised = 0
    try:
        # No other file, and nothing on a network, is opened, whatever this one says.
        with av.open(io.BytesIO(content), options={"protocol_whitelist": "none"}) as container:
            if not container.streams.video:
                raise ValueError("no picture in it, only sound or text: name a video")
            promised = container.streams.video[0].frames
            for frame in container.decode(video=0):
                pending.append(_upright(frame, height, width))
                count += 1
                if len(pending) == _TOGETHER:
                    yield np.stack(pending)
                    pending = []
    except av.error.FFmpegError as error:
        raise ValueError(f"not a video that PyAV can read ({error.strerror}): convert it, or get it again") from error
    if pending:
        yield np.stack(pending)
    if not count:
        raise ValueError("no frame in it: convert it, or get it again")
    if count < promised:
        _log.warning("a video promises %d frames, but %d can be read: it may be cut off", promised, count)


def _upright(frame: Any, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: the frame as players show it, turned as its file says (a phone's lies on its side)."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    coded = (width, height) if turns % 2 else (height, width)
    return np.rot90(frame.to_ndarray(format="rgb24", height=coded[0], width=coded[1]), turns)


def patches(frames: np.ndarray) -> np.ndarray:
    """[n, height, width, 3] uint8 -> [n * patches, PATCH * PATCH * 3] float32 from 0 to 1, line by line."""
    count, height, width, _ = frames.shape
    tiles = frames.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(-1, PATCH * PATCH * 3).astype(np.float32) / 255


def nearest(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """[n] the number of the code that is nearest to each of `points` [n, PATCH * PATCH * 3]."""
    codes = codebook.reshape(len(codebook), -1)
    half = 0.5 * np.square(codes).sum(1)
    pieces = [points[at : at + 8192] for at in range(0, len(points), 8192)]  # so that distances stay small in memory
    return np.concatenate([np.zeros(0, np.int64), *(np.argmin(half - piece @ codes.T, 1) for piece in pieces)])


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file; nothing in it is executed. Raises ValueError that names the file."""
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{path} is no array that can be read ({error}): name a .npy file, or make it again"
        ) from error


def load_video(path: str, frame_size: tuple[int, ...]) -> VideoTokenizer:
    """The tokenizer whose codebook lies at `path`, and the frames to look at beside it if there are any.

    Raises ValueError if the file holds no codebook.
    """
    place = Path(path).expanduser()
    codebook = read_npy(place)
    if codebook.shape[1:] != (PATCH, PATCH, 3) or codebook.dtype != np.float32 or not len(codebook):
        found = f"{codebook.dtype} {list(codebook.shape)}"
        raise ValueError(f"data.tokenizer={path!r} holds {found}: a codebook is float32 [codes, {PATCH}, {PATCH}, 3]")
    if not np.isfinite(codebook).all():
        raise ValueError(f"data.tokenizer={path!r} holds codes that are not finite: learn it again by 'video'")
    look = place.with_name("frames.npy")
    frames = read_npy(look) if look.is_file() else None
    if frames is not None and (frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*frame_size, 3)):
        frames = None  # of another size: the codebook serves all the same
    return VideoTokenizer(codebook, frame_size, frames)
