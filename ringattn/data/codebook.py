"""The codebook of video: learned by k-means from patches of the training frames, the same for the same videos."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ringattn.data.corpus import held_out, held_units, named
from ringattn.data.formats import Document
from ringattn.data.video import PATCH, VideoTokenizer, nearest, patches, read_frames

CODES = 512
_SAMPLE, _ITERATIONS = 16_384, 20  # patches from which the codebook is learned, and rounds of k-means
_LOOK, _APART = 4, 8  # held-out frames to look at, and how many frames lie from one to the next


def learn(
    sources: Sequence[Callable[[], Iterator[Document]]], frame_size: tuple[int, ...], share: float
) -> VideoTokenizer:
    """The tokenizer for the videos that each of `sources` reads; `share` of each is held out and not learned from.

    What is held out is what `corpus.split` holds out: some of several videos, the end of a single one. Raises
    ValueError that names a video which cannot be read.
    """
    sample, look = Sample(), np.zeros((0, *frame_size, 3), np.uint8)
    for read in sources:
        digests = [document.digest for document in read()]
        held = held_out(digests, share)
        for document, digest in zip(read(), digests, strict=True):
            at, begin = 0, _begin_of_held(document, frame_size, share) if len(digests) == 1 else None
            for frames in _frames(document, frame_size):
                known = (
                    (0 if digest in held else len(frames)) if begin is None else min(max(begin - at, 0), len(frames))
                )
                sample.add(frames[:known])
                later = at + np.arange(known, len(frames)) - (begin or 0)
                look = np.concatenate([look, frames[known:][later % _APART == 0]])[:_LOOK]
                at += len(frames)
    return VideoTokenizer(sample.codebook(), frame_size, look)


def _begin_of_held(document: Document, frame_size: tuple[int, ...], share: float) -> int:
    count = sum(map(len, _frames(document, frame_size)))
    return count - held_units(count, share, document.name)


def _frames(document: Document, frame_size: tuple[int, ...]) -> Iterator[np.ndarray]:
    with named(document):
        yield from read_frames(document.content, frame_size)


class Sample:
    """A fair draw of all patches that come by, of limited size, and the same for the same patches."""

    def __init__(self):
        self._bits = np.random.PCG64(0)
        self._keys, self._points = np.zeros(0, np.uint64), np.zeros((0, PATCH * PATCH * 3), np.float32)

    def add(self, frames: np.ndarray) -> None:
        points = patches(frames)
        # The patches of the smallest keys stay. Raw bits, which no version of NumPy makes anew.
        keys = np.concatenate([self._keys, np.atleast_1d(self._bits.random_raw(len(points)))])
        order = np.argsort(keys, kind="stable")[:_SAMPLE]
        self._keys, self._points = keys[order], np.concatenate([self._points, points])[order]

    def codebook(self) -> np.ndarray:
        """k-means (Lloyd 1982, doi:10.1109/TIT.1982.1056489): [codes, PATCH, PATCH, 3], fewer codes of few patches.

        A code that no patch is nearest to stays where it is.
        """
        points, codes = self._points, self._spread()
        for _ in range(_ITERATIONS):
            chosen = nearest(points, codes)
            counts = np.bincount(chosen, minlength=len(codes))
            used, order = np.flatnonzero(counts), np.argsort(chosen, kind="stable")
            codes[used] = np.add.reduceat(points[order], (np.cumsum(counts) - counts)[used]) / counts[used, None]
        return codes.reshape(-1, PATCH, PATCH, 3)

    def _spread(self) -> np.ndarray:
        """Where k-means begins: k-means++ (Arthur and Vassilvitskii 2007), patches drawn by their squared distance
        from those drawn before."""
        points, codes = self._points, []
        draws = (self._bits.random_raw(CODES) >> 11) * 2.0**-53  # from 0 to 1
        squares = np.square(points).sum(1)
        left = np.full(len(points), np.inf, np.float32)
        for draw in draws:
            if codes:
                sums = np.cumsum(left, dtype=np.float64)
                if sums[-1] <= 0:
                    break
                codes.append(points[min(int(np.searchsorted(sums, draw * sums[-1], side="right")), len(points) - 1)])
            else:
                codes.append(points[int(draw * len(points))])
            distance = squares - points @ (2 * codes[-1]) + squares.dtype.type(np.square(codes[-1]).sum())
            # What is left of a patch that is a code already is rounding.
            left = np.minimum(left, np.where(distance < 1e-4, np.float32(0), distance))
        return np.stack(codes)
