"""Documents to token ids and back: bytes as they are, or the vocabulary of a local tokenizer.json.

One id, the *boundary*, opens every document. Encoding never yields it, whatever the text says.
"""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

# What the common families call the end of a text, the most specific name first.
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
    """What turns documents into ids and back."""

    @property
    def name(self) -> str:
        """Its kind: bytes, file, dna or video."""
        ...

    @property
    def size(self) -> int:
        """How many ids there are, the boundary among them."""
        ...

    @property
    def boundary(self) -> int:
        """The id that opens a document."""
        ...

    @property
    def unlearned(self) -> int | None:
        """The id whose prediction has no weight in the loss, if there is one."""
        ...

    @property
    def unit(self) -> int:
        """A single document is cut, for validation, at a multiple of so many tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digits that change with any document's ids."""
        ...

    @property
    def files(self) -> dict[str, bytes]:
        """Names and contents of the files that hold what it needs beyond this code; a run keeps them."""
        ...

    def encode(self, document: bytes) -> np.ndarray:
        """Ids [tokens], of an unsigned or signed integer type that holds the boundary, too; ValueError if it cannot."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """What `ids` (any shape) stand for, without boundaries; ValueError for an id outside the vocabulary."""
        ...

    def byte_length(self, ids: ArrayLike) -> int:
        """How many bytes of text `ids` stand for, 0 if they stand for none; ValueError as `decode`."""
        ...


class ByteTokenizer:
    """Every byte is a token; id 256 is the boundary."""

    name = "bytes"
    size = 257
    boundary = 256
    unlearned = None
    unit = 1
    fingerprint = hashlib.sha256(b"bytes").hexdigest()
    files: dict[str, bytes] = {}  # noqa: RUF012

    def encode(self, document: bytes) -> np.ndarray:
        """Ids [bytes] uint16 of any bytes, text or not."""
        return np.frombuffer(document, np.uint8).astype(np.uint16)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` (any shape, read in order), without boundaries; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._bytes(ids).tobytes().decode("utf-8", errors="replace")

    def byte_length(self, ids: ArrayLike) -> int:
        """How many bytes of text `ids` stand for; a boundary stands for none. Raises as `decode` does."""
        return self._bytes(ids).size

    def _bytes(self, ids: ArrayLike) -> np.ndarray:
        checked = check_ids(ids, self.size)
        return checked[checked != self.boundary].astype(np.uint8)


class FileTokenizer:
    """The vocabulary of a tokenizer.json, read by the library `tokenizers`.

    The text alone is encoded: nothing is added, cut or padded, and a special token's name in it is plain text.
    Raises ValueError if the library is missing, or if the file cannot be read, is no tokenizer.json or names no
    special token for the end of a text.
    """

    name = "file"
    unlearned = None
    unit = 1

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError as error:
            cure = "pip install 'ringattn[tokenizers]', or use data.tokenizer=bytes"
            raise ValueError(f"data.tokenizer={path!r} needs the library tokenizers: {cure}") from error
        try:
            content = Path(path).expanduser().read_bytes()
        except OSError as error:
            cure = "name a readable tokenizer.json, or use 'bytes'"
            raise ValueError(f"data.tokenizer={path!r} cannot be read ({error.strerror}): {cure}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            cure = "name a file written by the library tokenizers, or use 'bytes'"
            raise ValueError(f"data.tokenizer={path!r} is not a valid tokenizer.json ({error}): {cure}") from error
        # A file may ask for all three; each would change the text without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        known = [name for name in BOUNDARIES if name in special]
        if not known:
            raise ValueError(
                f"data.tokenizer={path!r} names no end of a text among its special tokens "
                f"({', '.join(special) or 'it has none'}): add one of {', '.join(BOUNDARIES)} to its added_tokens"
            )
        self.boundary: int = special[known[0]]
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.files = {"tokenizer.json": content}

    def encode(self, document: bytes) -> np.ndarray:
        """Ids [tokens] of UTF-8 text, uint16 if the vocabulary fits, else int32. Raises UnicodeDecodeError."""
        text = document.decode("utf-8")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.uint16 if self.size <= 2**16 else np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` (any shape, read in order), without special tokens.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.size).tolist(), skip_special_tokens=True)

    def byte_length(self, ids: ArrayLike) -> int:
        """How many bytes of text `ids` stand for, but for a character cut at either end. Raises as `decode` does."""
        return len(self.decode(ids).encode("utf-8"))


def check_ids(ids: ArrayLike, size: int) -> np.ndarray:
    """`ids` as a flat int64 array. Raises ValueError for one that is not in the vocabulary."""
    flat = np.asarray(ids, np.int64).reshape(-1)
    outside = flat[(flat < 0) | (flat >= size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is not in the vocabulary of {size}: ids run from 0 to {size - 1}")
    return flat
