"""Codebook of the video tokenizer, learned with deterministic k-means from patches of the training frames."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress

import numpy as np

from ringattn.data.corpus import DIGEST, errors_naming
from ringattn.data.formats import Document
from ringattn.data.held_out import first_copies, held_out_lengths
from ringattn.data.video import PATCH, VideoTokenizer, nearest, patches, read_frames, tokens_per_frame

CODES = 512
_SAMPLE, _ITERATIONS = 16_384, 20  # k-means: number of sampled patches and of iterations
_PREVIEW_FRAMES, _PREVIEW_STRIDE = 4, 8  # held-out frames to show, and the stride between them


def learn(
    sources: Sequence[Callable[[], Iterator[Document]]], frame_size: tuple[int, ...], fraction: float
) -> VideoTokenizer:
    """Learns the tokenizer from the videos of all `sources`, each a function that yields documents.

    The codebook is learned without the frames that are held out (see `held_out_lengths`), and copies count once. Raises
    ValueError, naming the video, if it cannot be read.
    """
    sample, preview = Sample(), np.zeros((0, *frame_size, 3), np.uint8)
    digests = [np.frombuffer(b"".join(document.digest for document in read()), DIGEST) for read in sources]
    for read, distinct, kept in zip(sources, digests, first_copies(digests)[0], strict=True):
        starts = _held_out_starts(compress(read(), kept), distinct[kept], frame_size, fraction)
        for document, start in zip(compress(read(), kept), starts, strict=True):
            offset = 0
            for frames in _frames(document, frame_size):
                training = min(max(start - offset, 0), len(frames))
                sample.add(frames[:training])
                indices = offset + np.arange(training, len(frames)) - start
                shown = frames[training:][indices % _PREVIEW_STRIDE == 0]
                preview = np.concatenate([preview, shown])[:_PREVIEW_FRAMES]
                offset += len(frames)
    return VideoTokenizer(sample.codebook(), frame_size, preview)


def _held_out_starts(
    videos: Iterable[Document], digests: np.ndarray, frame_size: tuple[int, ...], fraction: float
) -> list[int]:
    """Returns the index of the first held-out frame of each video; the number of its frames if none is held out."""
    unit, lengths, name = tokens_per_frame(frame_size), [], ""
    for document in videos:
        lengths.append(1 + unit * sum(map(len, _frames(document, frame_size))))
        name = document.name
    if not lengths:
        return []
    held_out = held_out_lengths(np.array(lengths), digests, fraction, unit, name)
    return (np.maximum(lengths - held_out - 1, 0) // unit).tolist()


def _frames(document: Document, frame_size: tuple[int, ...]) -> Iterator[np.ndarray]:
    with errors_naming(document):
        yield from read_frames(document.content, frame_size)


class Sample:
    """A uniform random sample of at most 16,384 of the added patches; the same patches give the same sample."""

    def __init__(self):
        self._bits = np.random.PCG64(0)
        self._keys, self._points = np.zeros(0, np.uint64), np.zeros((0, PATCH * PATCH * 3), np.float32)

    def add(self, frames: np.ndarray) -> None:
        points = patches(frames)
        # Keep the patches with the smallest random keys. random_raw is stable across NumPy versions.
        keys = np.concatenate([self._keys, np.atleast_1d(self._bits.random_raw(len(points)))])
        order = np.argsort(keys, kind="stable")[:_SAMPLE]
        self._keys, self._points = keys[order], np.concatenate([self._points, points])[order]

    def codebook(self) -> np.ndarray:
        """Runs k-means (Lloyd 1982, doi:10.1109/TIT.1982.1056489) and returns codes [codes, PATCH, PATCH, 3].

        Fewer than CODES distinct patches give fewer codes. A code without assigned patches keeps its value.
        """
        points, codes = self._points, self._initial_codes()
        for _ in range(_ITERATIONS):
            assigned = nearest(points, codes)
            counts = np.bincount(assigned, minlength=len(codes))
            used, order = np.flatnonzero(counts), np.argsort(assigned, kind="stable")
            codes[used] = np.add.reduceat(points[order], (np.cumsum(counts) - counts)[used]) / counts[used, None]
        return codes.reshape(-1, PATCH, PATCH, 3)

    def _initial_codes(self) -> np.ndarray:
        """Returns the k-means++ initialization (Arthur and Vassilvitskii 2007).

        Each code is a patch, drawn with probability proportional to its squared distance to the nearest previous code.
        """
        points, codes = self._points, []
        draws = (self._bits.random_raw(CODES) >> 11) * 2.0**-53  # uniform in [0, 1)
        squares = np.square(points).sum(1)
        distances = np.full(len(points), np.inf, np.float32)
        for draw in draws:
            if codes:
                sums = np.cumsum(distances, dtype=np.float64)
                if sums[-1] <= 0:
                    break
                codes.append(points[min(int(np.searchsorted(sums, draw * sums[-1], side="right")), len(points) - 1)])
            else:
                codes.append(points[int(draw * len(points))])
            distance = squares - points @ (2 * codes[-1]) + squares.dtype.type(np.square(codes[-1]).sum())
            # Because of rounding, patches equal to a code have a small distance. The threshold excludes them.
            distances = np.minimum(distances, np.where(distance < 1e-4, np.float32(0), distance))
        return np.stack(codes)
