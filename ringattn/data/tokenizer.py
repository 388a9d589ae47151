"""The protocol of tokenizers, and the tokenizer whose tokens are bytes.

One id, the *boundary*, precedes every document. Encoding never produces it.
"""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from ringattn.data.text_bytes import Aligned


@runtime_checkable
class Tokenizer(Protocol):
    """Encodes documents to ids and decodes ids."""

    @property
    def name(self) -> str:
        """The kind of tokenizer: bytes, file, dna or video."""
        ...

    @property
    def size(self) -> int:
        """Vocabulary size, including the boundary."""
        ...

    @property
    def boundary(self) -> int:
        """The id that precedes a document: the target of its predecessor's last token."""
        ...

    @property
    def start(self) -> int:
        """The id that a model reads in place of the boundary: the begin-of-text token, or the boundary."""
        ...

    @property
    def ignored_id(self) -> int | None:
        """The id whose targets are masked out of the loss, if any."""
        ...

    @property
    def unit(self) -> int:
        """A single document is split into training and validation at a multiple of this number of tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest that differs between tokenizers that encode a document differently."""
        ...

    @property
    def files(self) -> dict[str, bytes]:
        """Names and contents of the files that the tokenizer is loaded from. A run directory stores copies."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """[size] int32: number of text bytes of each id, see `TextBytes`; 0 if it is not text."""
        ...

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [tokens] of an integer dtype that fits all ids. Raises ValueError for an invalid document."""
        ...

    def align(self, document: bytes) -> Aligned:
        """Encodes like `encode`. Also returns the tokens whose number of text bytes differs from `byte_lengths`."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape), without boundaries. Raises ValueError for an invalid id."""
        ...


class ByteTokenizer:
    """One token per byte; id 256 is the boundary."""

    name = "bytes"
    size = 257
    boundary = start = 256
    ignored_id = None
    unit = 1
    fingerprint = hashlib.sha256(b"bytes").hexdigest()
    files: dict[str, bytes] = {}  # noqa: RUF012
    byte_lengths = np.append(np.ones(256, np.int32), np.int32(0))

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [bytes] uint16. Any bytes are valid."""
        return np.frombuffer(document, np.uint8).astype(np.uint16)

    def align(self, document: bytes) -> Aligned:
        return Aligned(self.encode(document))

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape, flattened), without boundaries; invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        checked = check_ids(ids, self.size)
        return checked[checked != self.boundary].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def check_ids(ids: ArrayLike, size: int) -> np.ndarray:
    """Returns `ids` as a flat int64 array. Raises ValueError for an id outside the vocabulary."""
    flat = np.asarray(ids, np.int64).reshape(-1)
    outside = flat[(flat < 0) | (flat >= size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} must be from 0 to {size - 1}, for a vocabulary of {size}")
    return flat
