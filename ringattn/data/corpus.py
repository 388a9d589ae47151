"""Tokenized documents: storage in memory or files, and cutting of long documents."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ringattn.data.formats import Document
from ringattn.data.text_bytes import Corrections, TextBytes, concatenate
from ringattn.data.tokenizer import Tokenizer


class ShardedTokens:
    """Tokens stored in several arrays, usually memory-mapped, and indexed as one array."""

    def __init__(self, arrays: Sequence[np.ndarray], fingerprint: str):
        """`arrays`: [tokens] each, of one integer dtype. `fingerprint`: identifies the tokens of all arrays."""
        self._arrays = arrays
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum([array.size for array in arrays])])
        self.fingerprint, self.size, self.dtype = fingerprint, int(self._bounds[-1]), arrays[0].dtype

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens at `indices` (any shape); reads only the files that contain them."""
        tokens = np.empty(indices.shape, self.dtype)
        files = np.searchsorted(self._bounds, indices, side="right") - 1
        for file in np.unique(files):
            in_file = files == file
            tokens[in_file] = self._arrays[file][indices[in_file] - self._bounds[file]]
        return tokens


class Corpus(NamedTuple):
    """Tokenized documents, or pieces of documents. The target of each token is the next token in `tokens`."""

    tokens: np.ndarray | ShardedTokens
    """[tokens + 1], any integer dtype: concatenated documents, each preceded by a boundary, then a final boundary."""
    starts: np.ndarray
    """[pieces] int64: piece d is tokens[starts[d] : starts[d] + lengths[d]]."""
    lengths: np.ndarray
    """[pieces] int64."""
    masked_prefixes: np.ndarray
    """[pieces] int64: number of tokens at the start of each piece whose targets are masked out of the loss."""
    ignored_id: int | None = None
    """Targets with this id are masked out of the loss."""
    text_bytes: TextBytes | None = None
    """Number of bytes of text of each token; None if the tokens are not text."""
    boundary: int | None = None
    start: int | None = None
    """The id that a model reads in place of `boundary`."""

    @property
    def count(self) -> int:
        """Number of tokens in all pieces."""
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of all tokens and pieces."""
        tokens = self.tokens
        tokens_digest = tokens.fingerprint if isinstance(tokens, ShardedTokens) else _digest(tokens).hex()
        return hashlib.sha256(tokens_digest.encode() + b"".join(map(_digest, self[1:4]))).hexdigest()

    def inputs(self, indices: np.ndarray) -> np.ndarray:
        """Returns what a model reads for the tokens at `indices` (any shape), int32: `start` instead of `boundary`."""
        tokens = self.tokens[indices].astype(np.int32)
        if self.start is None or self.start == self.boundary:
            return tokens
        return np.where(tokens == self.boundary, np.int32(self.start), tokens)

    def count_bytes(self, indices: np.ndarray) -> np.ndarray:
        """Returns the number of bytes of text (int32; 0 if not text) of the tokens at `indices`, of any shape."""
        if self.text_bytes is None:
            return np.zeros(indices.shape, np.int32)
        return self.text_bytes.of(indices, self.tokens[indices])

    def take(self, chosen: np.ndarray) -> "Corpus":
        """Returns the pieces `chosen`, a boolean array or an array of piece indices."""
        return self._replace(
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            masked_prefixes=self.masked_prefixes[chosen],
        )


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()


class Documents(NamedTuple):
    """Tokenized documents of one path of data.path."""

    corpus: Corpus
    digests: np.ndarray
    """[documents], of dtype DIGEST."""
    kinds: list[str]
    """`Document.kind` of each document."""
    name: Callable[[int], str]
    """Maps a document's index to its name, for messages."""


DIGEST = np.dtype("V32")
"""SHA-256 of a document's content. Arrays of this dtype take 32 bytes per document and can be sorted."""


class EncodedDocument(NamedTuple):
    """A tokenized document."""

    tokens: np.ndarray
    """[tokens]: the boundary, then the tokens of the document."""
    masked_prefix: int
    """Number of targets at the start that are masked out of the loss."""
    digest: bytes
    """SHA-256 of the content, 32 bytes."""
    bytes_read: int
    """Number of bytes read from its file."""
    kind: str
    """See `Document.kind`."""
    name: str
    """See `Document.name`."""
    corrections: Corrections
    """Of `tokens`."""


@contextmanager
def errors_naming(document: Document) -> Iterator[None]:
    """Prefixes the message of a ValueError with the name of the document."""
    try:
        yield
    except UnicodeDecodeError as error:
        fix = "convert it to UTF-8, or use data.tokenizer=bytes"
        raise ValueError(f"{document.name} is not UTF-8 ({error.reason} at byte {error.start}); {fix}") from error
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    """Yields tokenized documents. Raises ValueError, naming the document, if the tokenizer cannot encode it."""
    for document in documents:
        masked_prefix = 0
        with errors_naming(document):
            tokens, corrections = tokenizer.align(document.content)
            if document.prompt:
                masked_prefix = common_prefix(tokenizer.encode(document.content[: document.prompt]), tokens)
        with_boundary = np.concatenate([np.array([tokenizer.boundary], tokens.dtype), tokens])
        source = document.digest, document.bytes_read, document.kind, document.name
        yield EncodedDocument(with_boundary, masked_prefix, *source, corrections.shift(1))


def common_prefix(prompt: np.ndarray, tokens: np.ndarray) -> int:
    """Returns the length of the common prefix of `prompt` and `tokens`.

    A token that spans the end of the prompt is not counted, so it is not masked out of the loss. Encoding the
    completion separately would give different tokens: some tokenizers prepend a space.
    """
    common = min(prompt.size, tokens.size)
    same = prompt[:common] == tokens[:common]
    return int(np.argmin(np.append(same, False)))


def build_corpus(encoded: Iterable[EncodedDocument], tokenizer: Tokenizer) -> Documents:
    """Returns the documents (at least one) with their tokens in memory."""
    arrays, masked_prefixes, digests, kinds, names, corrections, count = [], [], [], [], [], [], 0
    for document in encoded:
        arrays.append(document.tokens)
        masked_prefixes.append(document.masked_prefix)
        digests.append(document.digest)
        kinds.append(document.kind)
        names.append(document.name)
        corrections.append(document.corrections.shift(count))
        count += document.tokens.size
    lengths = np.array([array.size for array in arrays], np.int64)
    arrays.append(np.array([tokenizer.boundary], arrays[0].dtype))
    corpus = Corpus(
        np.concatenate(arrays),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(masked_prefixes, np.int64),
        tokenizer.ignored_id,
        TextBytes(tokenizer.byte_lengths, concatenate(corrections)),
        tokenizer.boundary,
        tokenizer.start,
    )
    return Documents(corpus, np.frombuffer(b"".join(digests), DIGEST), kinds, names.__getitem__)


def cut_long(corpus: Corpus, seq_len: int, overlap: int) -> Corpus:
    """Cuts documents longer than `seq_len` tokens into pieces of at most `seq_len` tokens.

    Each piece repeats the last `overlap` tokens of the preceding piece. Their targets are masked out of the loss,
    because they already count in the preceding piece.
    """
    stride = seq_len - overlap
    pieces = np.maximum(-(-(corpus.lengths - overlap) // stride), 1)
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts, lengths, prefixes = (np.repeat(x, pieces) for x in (corpus.starts, corpus.lengths, corpus.masked_prefixes))
    prefixes = np.maximum(prefixes - index * stride, np.where(index > 0, overlap, 0))
    lengths = np.minimum(lengths - index * stride, seq_len)
    return corpus._replace(
        starts=starts + index * stride, lengths=lengths, masked_prefixes=np.minimum(prefixes, lengths)
    )
