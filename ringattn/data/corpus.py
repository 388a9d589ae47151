"""Token documents: storage in memory or in files, split into training and validation, and cut into rows."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ringattn.data.formats import Document
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
    """Token documents, or pieces of documents. The target of each token is the next token in `tokens`."""

    tokens: np.ndarray | ShardedTokens
    """[tokens + 1], any integer dtype: concatenated documents, each preceded by a boundary, then a final boundary."""
    starts: np.ndarray
    """[pieces] int64: piece d is tokens[starts[d] : starts[d] + lengths[d]]."""
    lengths: np.ndarray
    """[pieces] int64."""
    masked_prefixes: np.ndarray
    """[pieces] int64: number of tokens at the start of each piece whose targets are masked out of the loss."""
    ignored_id: int | None = None
    """Token id whose targets are masked out of the loss."""

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

    def take(self, chosen: np.ndarray) -> "Corpus":
        """Returns the pieces `chosen`, a boolean array or an array of piece indices."""
        return self._replace(
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            masked_prefixes=self.masked_prefixes[chosen],
        )


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()


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
            tokens = tokenizer.encode(document.content)
            if document.prompt:
                masked_prefix = common_prefix(tokenizer.encode(document.content[: document.prompt]), tokens)
        with_boundary = np.concatenate([np.array([tokenizer.boundary], tokens.dtype), tokens])
        yield EncodedDocument(with_boundary, masked_prefix, document.digest, document.bytes_read, document.kind)


def common_prefix(prompt: np.ndarray, tokens: np.ndarray) -> int:
    """Returns the length of the common prefix of `prompt` and `tokens`.

    A token that spans the end of the prompt is not counted, so it is not masked out of the loss. Encoding the
    completion separately would give different tokens: some tokenizers prepend a space.
    """
    common = min(prompt.size, tokens.size)
    same = prompt[:common] == tokens[:common]
    return int(np.argmin(np.append(same, False)))


def build_corpus(encoded: Iterable[EncodedDocument], tokenizer: Tokenizer) -> tuple[Corpus, list[bytes], list[str]]:
    """Returns the documents (at least one) as a corpus in memory, with their digests and kinds."""
    arrays, masked_prefixes, digests, kinds = [], [], [], []
    for document in encoded:
        arrays.append(document.tokens)
        masked_prefixes.append(document.masked_prefix)
        digests.append(document.digest)
        kinds.append(document.kind)
    lengths = np.array([array.size for array in arrays], np.int64)
    arrays.append(np.array([tokenizer.boundary], arrays[0].dtype))
    corpus = Corpus(
        np.concatenate(arrays),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(masked_prefixes, np.int64),
        tokenizer.ignored_id,
    )
    return corpus, digests, kinds


def held_out_digests(digests: Sequence[bytes], fraction: float, name: str = "data.path") -> set[bytes]:
    """Returns the digests of the held-out documents: about `fraction` of the distinct ones, at least one, but not all.

    The choice depends only on the contents, not on a seed, and identical documents stay in the same split. A single
    document is not held out. Raises ValueError if all of several documents are identical; `name` is used in messages.
    """
    ranked = sorted(set(digests))
    if len(digests) == 1:
        return set()
    if len(ranked) == 1:
        problem = f"{name} has {len(digests)} identical documents, so none can be held out"
        raise ValueError(f"{problem}; keep one, or add different documents")
    return set(ranked[: min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)])


def held_out_units(units: int, fraction: float, name: str) -> int:
    """Returns the number of tokens or frames to hold out at the end of a single document: at least one, but not all.

    Raises ValueError if the document has fewer than two; `name` is used in messages.
    """
    if units < 2:
        size = f"{units} tokens or frames"
        raise ValueError(f"{name} is a single document of {size}, too short to hold out its end; use a longer one")
    return min(max(round(fraction * units), 1), units - 1)


def split(corpus: Corpus, digests: Sequence[bytes], fraction: float, unit: int, name: str) -> tuple[Corpus, Corpus]:
    """Returns (training, validation), split by `held_out_digests`. The end of a single document is held out.

    A single document is split at a multiple of `unit` tokens. No token is a target in both splits. `name` is used in
    messages. Raises ValueError: see `held_out_digests` and `held_out_units`.
    """
    held_out = held_out_digests(digests, fraction, name)
    if held_out:
        chosen = np.array([digest in held_out for digest in digests])
        return corpus.take(~chosen), corpus.take(chosen)
    document = corpus.take(np.arange(1))
    training_length = document.lengths - held_out_units((corpus.count - 1) // unit, fraction, name) * unit
    training = document._replace(
        lengths=training_length, masked_prefixes=np.minimum(document.masked_prefixes, training_length)
    )
    validation = document._replace(
        starts=document.starts + training_length,
        lengths=document.lengths - training_length,
        masked_prefixes=np.maximum(document.masked_prefixes - training_length, 0),
    )
    return training, validation


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
