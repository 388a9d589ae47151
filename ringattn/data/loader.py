"""Batches of packed rows, each a function of (seed, step) alone: resuming needs no state but the step."""

import hashlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from ringattn.config import Data
from ringattn.data.packing import Batch, Corpus, PackedRows, concatenate
from ringattn.data.sources import Document, read_documents
from ringattn.data.tokenizer import Tokenizer, load_tokenizer

_AHEAD = 2  # batches that are ready or being made while the device computes


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Documents for training and for validation, about `share` of them held out, at least one on either side.

    Who is held out depends on the contents alone: no seed moves it, and equal documents stay on one side. Of a text
    that is all one document, its end is held out. Raises ValueError if `share` is not between 0 and 1, or if
    there are several documents, but all the same.
    """
    if not 0 < share < 1:
        raise ValueError(f"data.validation={share} must lie between 0 and 1: use 0.05 to hold out a twentieth")
    digests = [hashlib.sha256(document.content).digest() for document in documents]
    ranked = sorted(set(digests))
    if len(documents) == 1:
        return _cut(documents[0], share)
    if len(ranked) == 1:
        raise ValueError(f"all {len(documents)} documents are the same text: leave one, or add others to data.path")
    held = set(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])
    pairs = list(zip(documents, digests, strict=True))
    return [one for one, digest in pairs if digest not in held], [one for one, digest in pairs if digest in held]


def _cut(document: Document, share: float) -> tuple[list[Document], list[Document]]:
    """One document in two, at the end of a line if there is one near, or else of a character."""
    content = document.content
    held = round(share * len(content))
    at = len(content) - held
    at = content.rfind(b"\n", at - held // 2, at) + 1 or at
    while at < len(content) and content[at] & 0xC0 == 0x80:  # not within a character of UTF-8
        at += 1
    return [Document(document.name, content[:at])], [Document(f"{document.name} (its end)", content[at:])]


class Loader:
    """Deals out the packed rows of `corpus`, epoch after epoch, `batch_size` rows a step, `seq_len` tokens a row.

    Epoch e's documents, and then its rows, come in an order drawn from (seed, e, stage). The rows that an epoch's end
    leaves are followed, in the same batch, by the next epoch's first. Raises ValueError, calling the text `name`, if
    it has less than a batch of rows, or if `seed` is negative.
    """

    def __init__(
        self, corpus: Corpus, seq_len: int, batch_size: int, seed: int, name: str = "training", stage: int = 0
    ):
        if seed < 0:
            raise ValueError(f"train.seed={seed} must not be negative: use 0 or more")
        _check_rows(corpus.tokens.size, seq_len, batch_size, name)
        self._corpus, self._seq_len, self._batch_size, self._seed = corpus, seq_len, batch_size, seed
        self._name, self._stage = name, stage
        self.rows_per_epoch: int = corpus.tokens.size // seq_len
        self._epoch = lru_cache(maxsize=2)(self._pack)  # a batch touches two epochs at most

    def recut(self, seq_len: int, batch_size: int, stage: int) -> "Loader":
        """The same text in other rows, from step 0 on, in an order that is the stage's own. Raises as `Loader` does."""
        return Loader(self._corpus, seq_len, batch_size, self._seed, self._name, stage)

    @property
    def fingerprint(self) -> str:
        """What stands for the text: 16 hexadecimal digits that change with any token or document's end."""
        digest = hashlib.sha256()
        for array in self._corpus:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0): each array [batch_size, seq_len], equal for equal (seed, step)."""
        epochs, rows = np.divmod(step * self._batch_size + np.arange(self._batch_size), self.rows_per_epoch)
        parts = []
        for epoch in np.unique(epochs):
            packed, order = self._epoch(int(epoch))
            parts.append(packed.rows(order[rows[epochs == epoch]]))
        return Batch(*map(np.concatenate, zip(*parts, strict=True)))

    def _pack(self, epoch: int) -> tuple[PackedRows, np.ndarray]:
        """The epoch's rows, and the order in which they are dealt: a batch is not the pages of one long document."""
        # Raw bits, since NumPy may change from one version to the next what a Generator makes of them.
        # Trailing zeros change nothing: stage 0 is what a run without stages draws.
        bits = np.random.PCG64([self._seed, epoch, self._stage])
        counts = self._corpus.offsets.size - 1, self.rows_per_epoch
        documents, rows = (np.argsort(bits.random_raw(count), kind="stable") for count in counts)
        return PackedRows(self._corpus, self._seq_len, documents), rows


def _check_rows(tokens: int, seq_len: int, batch_size: int, name: str) -> None:
    for field, value in (("data.seq_len", seq_len), ("train.batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{field}={value} must be at least 1")
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


def load(data: Data, batch_size: int, seed: int) -> tuple[Tokenizer, Loader, Loader]:
    """Reads, splits and tokenises `data`: the tokenizer, and the loaders of training and of validation.

    The validation rows do not depend on `seed`, so that runs compare. Raises ValueError where the text or the
    tokenizer cannot be read, or where either side has less than a batch of rows.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    training, validation = split(read_documents(data.path), data.validation)
    return (
        tokenizer,
        Loader(tokenize(training, tokenizer), data.seq_len, batch_size, seed, "training"),
        Loader(tokenize(validation, tokenizer), data.seq_len, batch_size, 0, "validation"),
    )


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Corpus:
    """The token documents of `documents` (at least one). Raises ValueError naming one that is not UTF-8 but must be."""
    encoded = []
    for document in documents:
        try:
            encoded.append(tokenizer.encode(document.content))
        except UnicodeDecodeError as error:
            cure = "convert it, or use data.tokenizer=bytes"
            raise ValueError(f"{document.name} is not UTF-8 ({error.reason} at byte {error.start}): {cure}") from error
    return concatenate(encoded, tokenizer.boundary)
