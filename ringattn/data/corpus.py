"""Token documents: how they lie in memory or in files, which are held out, how long ones are cut."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ringattn.data.formats import Document
from ringattn.data.tokenizer import Tokenizer


class ShardedTokens:
    """Tokens that lie in several arrays, as a rule memory-mapped, read as if they were one."""

    def __init__(self, arrays: Sequence[np.ndarray], fingerprint: str):
        """`arrays` [tokens] of one integer type; `fingerprint` stands for all that they hold."""
        self._arrays = arrays
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum([array.size for array in arrays])])
        self.fingerprint, self.size, self.dtype = fingerprint, int(self._bounds[-1]), arrays[0].dtype

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The tokens at `places` (any shape), read from the files that hold them alone."""
        found = np.empty(places.shape, self.dtype)
        files = np.searchsorted(self._bounds, places, side="right") - 1
        for number in np.unique(files):
            here = files == number
            found[here] = self._arrays[number][places[here] - self._bounds[number]]
        return found


class Corpus(NamedTuple):
    """Token documents, or pieces of them. A token's target is the token that lies behind it, in its piece or not."""

    tokens: np.ndarray | ShardedTokens
    """[tokens + 1], any integer type: documents end to end, each opened by the boundary, and one more boundary."""
    starts: np.ndarray
    """[pieces] int64: piece d is tokens[starts[d] : starts[d] + lengths[d]]."""
    lengths: np.ndarray
    """[pieces] int64."""
    contexts: np.ndarray
    """[pieces] int64: the targets of so many tokens at the piece's beginning have no weight in the loss."""
    unlearned: int | None = None
    """A token that has no weight as a target."""

    @property
    def count(self) -> int:
        """Tokens in all pieces."""
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digits that change with any token or piece."""
        tokens = self.tokens
        of_tokens = tokens.fingerprint if isinstance(tokens, ShardedTokens) else _digest(tokens).hex()
        return hashlib.sha256(of_tokens.encode() + b"".join(map(_digest, self[1:4]))).hexdigest()

    def take(self, chosen: np.ndarray) -> "Corpus":
        """The pieces `chosen`, an array of bool or of numbers."""
        return self._replace(starts=self.starts[chosen], lengths=self.lengths[chosen], contexts=self.contexts[chosen])


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()


class Encoded(NamedTuple):
    """A document as tokens."""

    tokens: np.ndarray
    """[tokens]: the boundary, then the document."""
    context: int
    """How many targets at its beginning have no weight."""
    digest: bytes
    """32 bytes that stand for its content."""
    read: int
    """How many bytes of a file were read for it."""
    kind: str
    """What it is one of, as Document.kind."""


@contextmanager
def named(document: Document) -> Iterator[None]:
    """Puts the document's name before the message of a ValueError."""
    try:
        yield
    except UnicodeDecodeError as error:
        cure = "convert it, or use data.tokenizer=bytes"
        raise ValueError(f"{document.name} is not UTF-8 ({error.reason} at byte {error.start}): {cure}") from error
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The documents as tokens, one after another. Raises ValueError naming one that the tokenizer cannot encode."""
    for document in documents:
        with named(document):
            tokens = tokenizer.encode(document.content)
            context = shared(tokenizer.encode(document.content[: document.prompt]), tokens) if document.prompt else 0
        whole = np.concatenate([np.array([tokenizer.boundary], tokens.dtype), tokens])
        yield Encoded(whole, context, document.digest, document.read, document.kind)


def shared(prompt: np.ndarray, tokens: np.ndarray) -> int:
    """How many tokens of a prompt are those with which the whole begins: a token across its end is to be learned.

    Encoded apart, what follows might begin otherwise than in the whole, with a space of the tokenizer's own.
    """
    common = min(prompt.size, tokens.size)
    same = prompt[:common] == tokens[:common]
    return int(np.argmin(np.append(same, False)))


def gather(encoded: Iterable[Encoded], tokenizer: Tokenizer) -> tuple[Corpus, list[bytes], list[str]]:
    """The documents in memory, their digests and kinds. At least one."""
    parts, contexts, digests, kinds = [], [], [], []
    for each in encoded:
        parts.append(each.tokens)
        contexts.append(each.context)
        digests.append(each.digest)
        kinds.append(each.kind)
    lengths = np.array([part.size for part in parts], np.int64)
    parts.append(np.array([tokenizer.boundary], parts[0].dtype))
    corpus = Corpus(
        np.concatenate(parts), np.cumsum(lengths) - lengths, lengths, np.array(contexts, np.int64), tokenizer.unlearned
    )
    return corpus, digests, kinds


def held_out(digests: Sequence[bytes], share: float) -> set[bytes]:
    """Which of several documents are for validation: about `share` of them, at least one, and not all.

    That depends on the contents alone: no seed moves it, and equal documents stay on one side. Of a single document
    none is. Raises ValueError if there are several documents, but all the same.
    """
    ranked = sorted(set(digests))
    if len(digests) == 1:
        return set()
    if len(ranked) == 1:
        raise ValueError(f"all {len(digests)} documents are the same: leave one, or add others to data.path")
    return set(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])


def held_units(units: int, share: float, name: str) -> int:
    """How many of a single document's tokens (frames), the last ones, are for validation, at least one and not all.

    Raises ValueError if it has only one, calling it `name`.
    """
    if units < 2:
        raise ValueError(f"{name} is a single document of {units} tokens or frames: give more, to hold out a part")
    return min(max(round(share * units), 1), units - 1)


def split(corpus: Corpus, digests: Sequence[bytes], share: float, unit: int, name: str) -> tuple[Corpus, Corpus]:
    """What is for training and what for validation, by `held_out`; of a single document the end is held out.

    It is cut at a multiple of `unit` tokens. No token is a target on both sides. Raises as `held_out` and `held_units`,
    calling the corpus `name`.
    """
    held = held_out(digests, share)
    if held:
        chosen = np.array([digest in held for digest in digests])
        return corpus.take(~chosen), corpus.take(chosen)
    whole = corpus.take(np.arange(1))
    end = held_units((corpus.count - 1) // unit, share, name) * unit
    begin = whole.lengths - end
    return (
        whole._replace(lengths=begin, contexts=np.minimum(whole.contexts, begin)),
        whole._replace(
            starts=whole.starts + begin, lengths=whole.lengths - begin, contexts=np.maximum(whole.contexts - begin, 0)
        ),
    )


def cut_long(corpus: Corpus, seq_len: int, overlap: int) -> Corpus:
    """Cuts what is longer than a row of `seq_len` tokens into pieces of a row.

    Each repeats the last `overlap` tokens of the one before, as context: their targets have weight there alone.
    """
    new = seq_len - overlap
    pieces = np.maximum(-(-(corpus.lengths - overlap) // new), 1)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts, lengths, contexts = (np.repeat(x, pieces) for x in (corpus.starts, corpus.lengths, corpus.contexts))
    left = lengths - number * new
    contexts = np.maximum(contexts - number * new, np.where(number > 0, overlap, 0))
    lengths = np.minimum(left, seq_len)
    return corpus._replace(starts=starts + number * new, lengths=lengths, contexts=np.minimum(contexts, lengths))
