"""Tokenizers for text: bytes, or the vocabulary of a local tokenizer.json.

One id, the *boundary*, precedes every document. Encoding never produces it.
"""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

# End-of-text tokens of common model families, the most specific first.
BOUNDARIES = (
    "<|endoftext|>",  # GPT-2, GPT-NeoX, Qwen, Phi, SmolLM
    "<|end_of_text|>",  # Llama 3
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "</s>",  # Llama 2, Mistral, T5
    "<eos>",  # Gemma
    "[EOS]",
    "[SEP]",  # BERT
)


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
        """The id that precedes a document."""
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

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [tokens] of an integer dtype that fits all ids. Raises ValueError for an invalid document."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape), without boundaries. Raises ValueError for an invalid id."""
        ...

    def byte_length(self, ids: ArrayLike) -> int:
        """Returns the number of bytes of text in `ids`; 0 if they are not text. Raises ValueError: see `decode`."""
        ...


class ByteTokenizer:
    """One token per byte; id 256 is the boundary."""

    name = "bytes"
    size = 257
    boundary = 256
    ignored_id = None
    unit = 1
    fingerprint = hashlib.sha256(b"bytes").hexdigest()
    files: dict[str, bytes] = {}  # noqa: RUF012

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [bytes] uint16. Any bytes are valid."""
        return np.frombuffer(document, np.uint8).astype(np.uint16)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape, flattened), without boundaries; invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._bytes(ids).tobytes().decode("utf-8", errors="replace")

    def byte_length(self, ids: ArrayLike) -> int:
        """Returns the number of bytes in `ids`, without boundaries. Raises ValueError: see `decode`."""
        return self._bytes(ids).size

    def _bytes(self, ids: ArrayLike) -> np.ndarray:
        checked = check_ids(ids, self.size)
        return checked[checked != self.boundary].astype(np.uint8)


class FileTokenizer:
    """The vocabulary of a tokenizer.json, read with the package `tokenizers`.

    Encodes without adding special tokens, truncation or padding. Names of special tokens in the text are encoded as
    plain text. Raises ValueError if the package is missing, or if the file cannot be read, is not a tokenizer.json or
    has no end-of-text token.
    """

    name = "file"
    ignored_id = None
    unit = 1

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError as error:
            fix = "run pip install 'ringattn[tokenizers]', or use data.tokenizer=bytes"
            raise ValueError(f"data.tokenizer={path!r} requires the package tokenizers; {fix}") from error
        try:
            content = Path(path).expanduser().read_bytes()
        except OSError as error:
            fix = "use a readable tokenizer.json, or 'bytes'"
            raise ValueError(f"data.tokenizer={path!r} cannot be read ({error.strerror}); {fix}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # tokenizers raises bare Exception
            fix = "use a file saved by the package tokenizers, or 'bytes'"
            raise ValueError(f"data.tokenizer={path!r} is not a valid tokenizer.json ({error}); {fix}") from error
        # The file can enable truncation, padding and special tokens in text, which would silently change documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = {token.content: token_id for token_id, token in added if token.special}
        boundaries = [name for name in BOUNDARIES if name in special]
        if not boundaries:
            raise ValueError(
                f"data.tokenizer={path!r} has no end-of-text token among its special tokens "
                f"({', '.join(special) or 'none'}); add one of {', '.join(BOUNDARIES)} to its added_tokens"
            )
        self.boundary: int = special[boundaries[0]]
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.files = {"tokenizer.json": content}

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [tokens] of UTF-8 text, uint16 if the vocabulary fits, else int32. Raises UnicodeDecodeError."""
        text = document.decode("utf-8")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.uint16 if self.size <= 2**16 else np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape, flattened), without special tokens.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.size).tolist(), skip_special_tokens=True)

    def byte_length(self, ids: ArrayLike) -> int:
        """Returns the number of bytes of text in `ids`, approximate if they start or end within a character.

        Raises ValueError: see `decode`.
        """
        return len(self.decode(ids).encode("utf-8"))


def check_ids(ids: ArrayLike, size: int) -> np.ndarray:
    """Returns `ids` as a flat int64 array. Raises ValueError for an id outside the vocabulary."""
    flat = np.asarray(ids, np.int64).reshape(-1)
    outside = flat[(flat < 0) | (flat >= size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} must be from 0 to {size - 1}, for a vocabulary of {size}")
    return flat
