"""Batches of packed rows. Each batch is a function of (seed, stage, step), so resuming needs only the step."""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ringattn.config import Data, option
from ringattn.data.corpus import Corpus, cut_long
from ringattn.data.dataset import Splits, read
from ringattn.data.mixture import Mixture, integer_counts
from ringattn.data.packing import Arrays, Batch, PackedRows, concatenate
from ringattn.data.tokenizer import Tokenizer

_PREFETCHED = 2  # batches prepared ahead of the device

ReadRows = Callable[[PackedRows, np.ndarray, np.ndarray], Arrays]
"""Takes rows, row indices [B] and their indices in the batch [B]; returns a batch or an array [B, L]."""


class Seed(NamedTuple):
    value: int
    stage: int = 0
    """Index of the stage. Stages shuffle documents and rows differently."""


class Packing(NamedTuple):
    """How documents are packed into rows."""

    overlap: int = 0
    """Tokens by which the pieces of a document that is longer than a row overlap."""
    separate_documents: bool = True
    """See `PackedRows`."""


SEPARATE = Packing()


class Rows:
    """Rows of one corpus over all epochs. Each epoch shuffles documents, then rows, by (seed, epoch, stage)."""

    def __init__(self, corpus: Corpus, seq_len: int, seed: Seed, packing: Packing):
        self.fingerprint: str = corpus.fingerprint  # before cut_long, so that it does not depend on seq_len
        self._corpus = cut_long(corpus, seq_len, packing.overlap) if packing.overlap else corpus
        self._seq_len, self._seed, self._packing = seq_len, seed, packing
        self.per_epoch: int = self._corpus.count // seq_len
        self._epoch = lru_cache(maxsize=2)(self._pack)  # a batch spans at most two epochs

    @property
    def tokens(self) -> int:
        return self._corpus.count

    @property
    def has_targets(self) -> bool:
        """True unless masked prefixes cover all tokens."""
        return bool(np.any(self._corpus.masked_prefixes < self._corpus.lengths))

    def rows(self, indices: np.ndarray, batch_rows: np.ndarray, read: ReadRows[Arrays]) -> Arrays:
        """Returns what `read` returns for the rows with `indices` ([B], ascending, across epochs).

        `batch_rows` ([B]) are the indices of the rows in the batch.
        """
        epochs, rows = np.divmod(indices, self.per_epoch)
        batches = []
        for epoch in np.unique(epochs):
            packed, order = self._epoch(int(epoch))
            batches.append(read(packed, order[rows[epochs == epoch]], batch_rows[epochs == epoch]))
        return concatenate(batches)

    def _pack(self, epoch: int) -> tuple[PackedRows, np.ndarray]:
        """Returns the rows of an epoch, and a random permutation of them.

        Without the permutation, a batch would often consist of consecutive rows of one long document.
        """
        # random_raw, because Generator methods can change between versions of NumPy.
        # PCG64 ignores trailing zeros of a seed, so stage 0 has the order of a run without stages.
        bits = np.random.PCG64([self._seed.value, epoch, self._seed.stage])
        counts = self._corpus.starts.size, self.per_epoch
        pieces, rows = (np.argsort(np.atleast_1d(bits.random_raw(count)), kind="stable") for count in counts)
        if self._packing.overlap:
            # Pieces that fill a row come first, so that each one, with its overlap, is exactly one row.
            pieces = pieces[np.argsort(self._corpus.lengths[pieces] < self._seq_len, kind="stable")]
        return PackedRows(self._corpus, self._seq_len, pieces, self._packing.separate_documents), rows


class Loader:
    """Batches of packed rows of `corpora` over all epochs: `batch_size` rows per step, `seq_len` tokens per row.

    Rows of several corpora are mixed in the proportions `mixture`; with None, each row occurs once per epoch. A batch
    at the end of an epoch is completed with rows of the next epoch. `name` is used in messages.

    Raises ValueError if a single corpus has fewer rows than a batch, if one of several corpora has no full row, if all
    targets are masked out of the loss, or if `seed` is negative.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        seq_len: int,
        batch_size: int,
        seed: Seed | int,
        name: str = "training",
        packing: Packing = SEPARATE,
        mixture: tuple[float, ...] | None = None,
    ):
        seed = seed if isinstance(seed, Seed) else Seed(seed)
        if seed.value < 0:
            raise ValueError(f"train.seed={seed.value} must be at least 0")
        for field, value in (("data.seq_len", seq_len), ("train.batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{option(field)}={value} must be at least 1")
        self._sources = [Rows(corpus, seq_len, seed, packing) for corpus in corpora]
        for source in self._sources:
            _check_rows(source.tokens, seq_len, batch_size if len(corpora) == 1 else None, name)
        if not any(source.has_targets for source in self._sources):
            raise ValueError(
                f"the {name} text consists only of prompts, which are masked out of the loss; use more text"
            )
        per_epoch = tuple(source.per_epoch for source in self._sources)
        counts = per_epoch if mixture is None or len(corpora) == 1 else integer_counts(mixture)
        self._batch_size, self._mixture, self._proportions = batch_size, Mixture(counts, *seed), mixture or ()
        # An epoch ends before any source repeats, but has at least one batch, which repeats rows if there are too few.
        cycles = min(rows // count for rows, count in zip(per_epoch, counts, strict=True))
        self.rows_per_epoch: int = max(sum(counts) * cycles, batch_size)

    @property
    def fingerprint(self) -> str:
        """Digest of all tokens, document boundaries and mixture proportions, 16 hexadecimal digits."""
        return fingerprint([source.fingerprint for source in self._sources], self._proportions)

    def batch(self, step: int, needed: np.ndarray | None = None) -> Batch:
        """Returns the batch of `step` (from 0). Arrays are [batch_size, seq_len]. `needed`: see `PackedRows.rows`."""

        def read(packed: PackedRows, rows: np.ndarray, batch_rows: np.ndarray) -> Batch:
            return packed.rows(rows, None if needed is None else needed[batch_rows])

        return self._read(step, read)

    def text_bytes(self, step: int) -> np.ndarray:
        """Returns the number of bytes of text of each target of `batch(step)`: [batch_size, seq_len] int32."""
        return self._read(step, lambda packed, rows, batch_rows: packed.text_bytes(rows))

    def _read(self, step: int, read: ReadRows[Arrays]) -> Arrays:
        """Returns what `read` returns for the rows of the batch of `step`."""
        batch_rows = np.arange(self._batch_size)
        rows = step * self._batch_size + batch_rows
        if len(self._sources) == 1:
            return self._sources[0].rows(rows, batch_rows, read)
        sources, indices = self._mixture.locate(rows)
        drawn = {int(source): batch_rows[sources == source] for source in np.unique(sources)}
        batches = [self._sources[source].rows(indices[drawn[source]], drawn[source], read) for source in drawn]
        inverse = np.argsort(np.concatenate(list(drawn.values())))
        return jax.tree.map(lambda array: array[inverse], concatenate(batches))


def fingerprint(corpora: Sequence[str], mixture: tuple[float, ...] | None) -> str:
    """Returns a digest of the fingerprints `corpora` and of their mixture, 16 hexadecimal digits."""
    return hashlib.sha256("/".join([*corpora, *map(str, mixture or ())]).encode()).hexdigest()[:16]


def _check_rows(tokens: int, seq_len: int, batch_size: int | None, name: str) -> None:
    """Raises ValueError unless `tokens` fill a row, or `batch_size` rows if that is not None."""
    rows, min_rows = tokens // seq_len, batch_size or 1
    if rows >= min_rows:
        return
    fixes = ["use more text"]
    if name == "validation":
        fixes.append("a larger data.validation")
    if tokens >= min_rows:
        fixes.append(f"{option('data.seq_len')} of at most {tokens // min_rows}")
    if rows:
        fixes.append(f"{option('train.batch_size')} of at most {rows}")
    row = f"{option('data.seq_len')}={seq_len}"
    if batch_size is None:
        problem = f"a source of the {name} text has {tokens} tokens, so it has no full row of {row}"
    else:
        problem = f"the {name} text has {tokens} tokens, so {rows} rows of {row}"
        problem += f", fewer than {option('train.batch_size')}={batch_size}"
    raise ValueError(f"{problem}; {', or '.join(fixes)}")


def prefetch(loader: Loader, start: int, stop: int, needed: np.ndarray | None = None) -> Generator[Batch, None, None]:
    """Yields the batches of steps `start` to `stop - 1`, prepared ahead in a thread. Re-raises its exceptions.

    `needed`: see `Loader.batch`. The thread ends after the last batch, or when the generator is closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    pending: deque[Future[Batch]] = deque()
    try:
        for step in range(start, stop):
            pending.append(pool.submit(loader.batch, step, needed))
            if len(pending) > _PREFETCHED:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(data: Data, batch_size: int, seed: int, run_directory: Path | None = None) -> tuple[Tokenizer, Loader, Loader]:
    """Reads, tokenizes and splits `data`; returns the tokenizer, the training loader and the validation loader.

    Raises ValueError: see `read` and `make_loaders`.
    """
    splits = read(data, run_directory)
    return splits.tokenizer, *make_loaders(splits, data, batch_size, seed)


def make_loaders(splits: Splits, data: Data, batch_size: int, seed: int, stage: int = 0) -> tuple[Loader, Loader]:
    """Returns the training and validation loaders of `splits`.

    The order of validation rows does not depend on seed or stage, so that runs of equal seq_len are comparable. Raises
    ValueError: see `Loader`.
    """
    options = Packing(data.overlap, data.separate_documents), data.mixture
    training = Loader(splits.training, data.seq_len, batch_size, Seed(seed, stage), "training", *options)
    return training, Loader(splits.validation, data.seq_len, batch_size, 0, "validation", *options)
