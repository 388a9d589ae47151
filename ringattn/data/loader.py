"""Batches of packed rows, each a function of (seed, step) alone: resuming needs no state but the step."""

import hashlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringattn.config import Data
from ringattn.data.corpus import Corpus, cut_long
from ringattn.data.mixture import Mixture, counts_of
from ringattn.data.packing import Batch, PackedRows
from ringattn.data.reading import Sides, read
from ringattn.data.tokenizer import Tokenizer

_AHEAD = 2  # batches that are ready or being made while the device computes


class Seed(NamedTuple):
    number: int
    stage: int = 0
    """Each stage of a run draws an order of its own."""


class Rows:
    """The rows of one corpus, epoch after epoch.

    Epoch e's documents, and then its rows, come in an order drawn from (seed, e, stage).
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: Seed, overlap: int = 0):
        self.fingerprint: str = corpus.fingerprint  # before it is cut: the same in rows of any length
        self._corpus = cut_long(corpus, seq_len, overlap) if overlap else corpus
        self._seq_len, self._seed, self._overlap = seq_len, seed, overlap
        self.per_epoch: int = self._corpus.count // seq_len
        self._epoch = lru_cache(maxsize=2)(self._pack)  # a batch touches two epochs at most

    @property
    def tokens(self) -> int:
        return self._corpus.count

    @property
    def learned(self) -> bool:
        """Whether any target has weight, but for tokens that are never learned."""
        return bool(np.any(self._corpus.contexts < self._corpus.lengths))

    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows `numbers` ([B], from 0, rising), counted through all epochs."""
        epochs, rows = np.divmod(numbers, self.per_epoch)
        parts = []
        for epoch in np.unique(epochs):
            packed, order = self._epoch(int(epoch))
            parts.append(packed.rows(order[rows[epochs == epoch]]))
        return Batch(*map(np.concatenate, zip(*parts, strict=True)))

    def _pack(self, epoch: int) -> tuple[PackedRows, np.ndarray]:
        """The epoch's rows, and the order in which they are dealt: a batch is not the pages of one long document."""
        # Raw bits, since NumPy may change from one version to the next what a Generator makes of them.
        # Trailing zeros change nothing: stage 0 is what a run without stages draws.
        bits = np.random.PCG64([self._seed.number, epoch, self._seed.stage])
        counts = self._corpus.starts.size, self.per_epoch
        pieces, rows = (np.argsort(np.atleast_1d(bits.random_raw(count)), kind="stable") for count in counts)
        if self._overlap:
            # Pieces that fill a row come first, so that each lies in a row of its own, with its context.
            pieces = pieces[np.argsort(self._corpus.lengths[pieces] < self._seq_len, kind="stable")]
        return PackedRows(self._corpus, self._seq_len, pieces), rows


class Loader:
    """Deals out the packed rows of `corpora`, epoch after epoch, `batch_size` rows a step, `seq_len` tokens a row.

    Rows of several corpora come in the proportions of `mixture`; without it each row of each comes once an epoch.
    The rows that an epoch's end leaves are followed, in the same batch, by the next epoch's first. Documents longer
    than a row are cut with `overlap` tokens of context. Raises ValueError, calling the text `name`, if there is less
    than a batch of rows, if a corpus of several has no row, or if `seed` is negative.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        seq_len: int,
        batch_size: int,
        seed: Seed | int,
        name: str = "training",
        overlap: int = 0,
        mixture: tuple[float, ...] | None = None,
    ):
        seed = seed if isinstance(seed, Seed) else Seed(seed)
        if seed.number < 0:
            raise ValueError(f"train.seed={seed.number} must not be negative: use 0 or more")
        for field, value in (("data.seq_len", seq_len), ("train.batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{field}={value} must be at least 1")
        self._sources = [Rows(corpus, seq_len, seed, overlap) for corpus in corpora]
        least = batch_size if len(corpora) == 1 else 1
        for source in self._sources:
            _check_rows(source.tokens, seq_len, least, name)
        if not any(source.learned for source in self._sources):
            raise ValueError(f"all of the {name} text is prompt, with nothing to learn: use more text")
        there = tuple(source.per_epoch for source in self._sources)
        counts = there if mixture is None or len(corpora) == 1 else counts_of(mixture)
        self._batch_size, self._mixture, self._shares = batch_size, Mixture(counts, *seed), mixture or ()
        # Until the first source begins anew; of few rows, a batch that has some twice is better than none.
        cycles = min(rows // count for rows, count in zip(there, counts, strict=True))
        self.rows_per_epoch: int = max(sum(counts) * cycles, batch_size)

    @property
    def fingerprint(self) -> str:
        """What stands for the text: 16 hexadecimal digits that change with any token, any document's end or share."""
        return fingerprint([source.fingerprint for source in self._sources], self._shares)

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0): each array [batch_size, seq_len], equal for equal (seed, step)."""
        wanted = step * self._batch_size + np.arange(self._batch_size)
        if len(self._sources) == 1:
            return self._sources[0].rows(wanted)
        sources, numbers = self._mixture.places(wanted)
        chosen = np.unique(sources)
        parts = [self._sources[source].rows(numbers[sources == source]) for source in chosen]
        back = np.argsort(np.concatenate([np.flatnonzero(sources == source) for source in chosen]))
        return Batch(*(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True)))


def fingerprint(corpora: Sequence[str], mixture: tuple[float, ...] | None) -> str:
    """16 hexadecimal digits that stand for corpora of these fingerprints, mixed so."""
    return hashlib.sha256("/".join([*corpora, *map(str, mixture or ())]).encode()).hexdigest()[:16]


def _check_rows(tokens: int, seq_len: int, batch_size: int, name: str) -> None:
    rows = tokens // seq_len
    if rows >= batch_size:
        return
    cures = ["use more text"]
    if name == "validation":
        cures.append("a larger data.validation")
    if tokens >= batch_size:
        cures.append(f"data.seq_len of at most {tokens // batch_size}")
    if rows:
        cures.append(f"train.batch_size of at most {rows}")
    raise ValueError(
        f"the {name} text holds {tokens} tokens, so {rows} rows of data.seq_len={seq_len}, "
        f"fewer than train.batch_size={batch_size}: {', or '.join(cures)}"
    )


def prefetch(loader: Loader, start: int, stop: int) -> Generator[Batch, None, None]:
    """The batches of steps `start` to `stop - 1`, computed ahead by a thread, whose errors are raised here.

    The thread ends with the last batch, or when the generator is closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    pending: deque[Future[Batch]] = deque()
    try:
        for step in range(start, stop):
            pending.append(pool.submit(loader.batch, step))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(data: Data, batch_size: int, seed: int, kept: Path | None = None) -> tuple[Tokenizer, Loader, Loader]:
    """Reads, splits and tokenises `data`: the tokenizer, and the loaders of training and of validation.

    `kept` may hold what a run's tokenizer needs. Raises ValueError where text or tokenizer cannot be read, or as `deal`
    does.
    """
    sides = read(data, kept)
    return sides.tokenizer, *deal(sides, data, batch_size, seed)


def deal(sides: Sides, data: Data, batch_size: int, seed: int, stage: int = 0) -> tuple[Loader, Loader]:
    """The loaders of training and of validation, of what was read before, in the rows of `data`.

    The validation rows depend neither on seed nor on stage, so that runs compare. Raises ValueError where either side
    has less than a batch of rows.
    """
    cut = data.overlap, data.mixture
    training = Loader(sides.training, data.seq_len, batch_size, Seed(seed, stage), "training", *cut)
    return training, Loader(sides.validation, data.seq_len, batch_size, 0, "validation", *cut)
