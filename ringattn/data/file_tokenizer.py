"""The tokenizer of a local tokenizer.json. Rejects text that it would drop, and counts the text bytes of each token."""

import hashlib
import json
import logging
import re
import unicodedata
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ringattn.data.text_bytes import Aligned, Corrections, counted, uncovered
from ringattn.data.tokenizer import check_ids
from ringattn.runs.files import expanded, read_small

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
MAX_SIZE = 2**24
"""Maximum size of a vocabulary. A larger one would need gigabytes for the spellings alone."""
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # other bytes do not occur in UTF-8

_log = logging.getLogger(__name__)


class FileTokenizer:
    """The vocabulary of a tokenizer.json, read with the package `tokenizers`.

    Encodes without special tokens, and disables dropout, truncation and padding of the file: documents are encoded
    completely and deterministically. Names of special tokens in the text are encoded as plain text.

    Raises ValueError if the package is missing, if the file cannot be read or is not a tokenizer.json, if it has no
    end-of-text token, or if the unknown token that it names is missing.
    """

    name = "file"
    ignored_id = None
    unit = 1

    def __init__(self, path: str, content: bytes | None = None):
        """`content`: of the tokenizer.json, if `path` only names its origin in messages. None: read it from `path`."""
        self._path = path
        self._tokenizer, content = _open(path, content)
        switched_off = _switch_off(self._tokenizer)
        if switched_off:
            reason = "so that documents are encoded completely and deterministically"
            _log.warning("data.tokenizer=%r: disabled its %s, %s", path, " and ".join(switched_off), reason)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size: int = 1 + max(vocabulary.values(), default=-1)
        if self.size > MAX_SIZE:
            problem = f"has the token id {self.size - 1:,}, and {len(vocabulary):,} tokens"
            raise ValueError(f"data.tokenizer={path!r} {problem}; ids must be below {MAX_SIZE:,}: it is damaged")
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = {token.content: token_id for token_id, token in added if token.special}
        self._boundary_name = next((name for name in BOUNDARIES if name in special), "")
        if not self._boundary_name:
            raise ValueError(
                f"data.tokenizer={path!r} has no end-of-text token among its special tokens "
                f"({', '.join(special) or 'none'}); add one of {', '.join(BOUNDARIES)} to its added_tokens"
            )
        self.boundary: int = special[self._boundary_name]
        first = self._tokenizer.encode("", add_special_tokens=True).ids  # of a post-processor such as '<s> $A'
        self.start: int = first[0] if len(first) == 1 else self.boundary
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.files = {"tokenizer.json": content}
        parts = json.loads(content)
        model, normalizer = parts["model"], _types(parts.get("normalizer"))
        is_byte_level = "ByteLevel" in normalizer | _types(parts.get("pre_tokenizer"))
        unknown = self._check_unknown(model, is_byte_level)
        spellings = _spellings(vocabulary, self.size, model, is_byte_level)
        self.byte_lengths = np.array(list(map(len, spellings)), np.int32)
        self.byte_lengths[[*special.values(), *([] if unknown is None else [unknown])]] = 0
        self._is_byte_level, self._normalizes_to_letters = is_byte_level, "ByteLevel" in normalizer
        # Without an unknown token, single bytes of a character can be lost.
        loses_bytes = is_byte_level and unknown is None and not _encodes_all_bytes(vocabulary, model, is_byte_level)
        self._spellings = spellings if loses_bytes else None

    def _check_unknown(self, model: dict[str, Any], is_byte_level: bool) -> int | None:
        """Returns the id of the unknown token, None if there is none. Raises ValueError if it is needed but missing."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        if isinstance(model["vocab"], list):  # Unigram, whose vocabulary is a list of pieces
            unknown, fault = model.get("unk_id"), "names no unknown token"
        else:
            name = model.get("unk_token")
            unknown, fault = vocabulary.get(name), f"names the unknown token {name!r}, which its vocabulary lacks"
            if not name or _encodes_all_bytes(vocabulary, model, is_byte_level):  # it is not needed
                return unknown
        if unknown is None:
            problem = f"{fault}, so that text outside the vocabulary cannot be encoded"
            raise ValueError(f"data.tokenizer={self._path!r} {problem}; add it, or use data.tokenizer=bytes")
        return unknown

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [tokens] of UTF-8 text, uint16 if the vocabulary fits, else int32.

        Raises UnicodeDecodeError, and ValueError if text would be lost. Every character must belong to a token, except
        white space, and control characters and accents that the normalizer of the tokenizer removes.
        """
        return self.align(document).ids

    def align(self, document: bytes) -> Aligned:
        """Encodes like `encode`. Also returns the tokens whose number of text bytes differs from `byte_lengths`."""
        text = document.decode("utf-8")
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"data.tokenizer={self._path!r} cannot encode the text ({error}); use another") from error
        ids = np.asarray(encoding.ids, np.uint16 if self.size <= 2**16 else np.int32)
        if np.any(ids == self.boundary):
            problem = f"turns a part of the text into its end-of-text token {self._boundary_name!r}"
            fix = "remove that part, or use data.tokenizer=bytes"
            raise ValueError(f"data.tokenizer={self._path!r} {problem}; {fix}")
        normalized, usual = self._normalize(text), self.byte_lengths[ids]
        self._check_bytes(normalized, ids)
        if self._is_byte_level and normalized == text and usual.sum() == len(document):
            return Aligned(ids)
        offsets = _offsets(encoding)
        hidden = _not_space(text, uncovered(document, offsets))
        self._check_characters(text, normalized, hidden)
        counts = counted(document, offsets, hidden)
        positions = np.flatnonzero(counts != usual)
        return Aligned(ids, Corrections(positions, counts[positions]))

    def _normalize(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    @cached_property
    def _without_normalizer(self) -> Any:
        tokenizer = type(self._tokenizer).from_str(
            json.dumps(json.loads(self.files["tokenizer.json"]) | {"normalizer": None})
        )
        _switch_off(tokenizer)
        return tokenizer

    def _check_bytes(self, normalized: str, ids: np.ndarray) -> None:
        """Raises ValueError if a byte of the normalized text, except white space, is not in the tokens."""
        if self._spellings is None:
            return
        if self._normalizes_to_letters:
            normalized = bytes(map(_BYTE_LETTERS.index, normalized)).decode()
        spelled = b"".join(self._spellings[token] for token in ids.tolist()).decode(errors="replace")
        # Added tokens contain the text before normalization.
        expected, found = self._normalize(normalized), self._normalize(spelled)
        kept = "".join(found.split())
        if kept != "".join(expected.split()):
            visible = _not_space(expected, np.arange(len(expected))).tolist()
            pairs = zip_longest(visible, kept[: len(visible)])
            lost = next((index for index, character in pairs if expected[index] != character), None)
            if lost is not None:
                self._refuse(expected, lost)

    def _check_characters(self, text: str, normalized: str, hidden: np.ndarray) -> None:
        """Raises ValueError if a character at the indices `hidden`, which is in no token, is lost.

        The normalizer may compose it with the preceding character, or remove a control character or an accent.
        """
        if not hidden.size:
            return
        for index in hidden.tolist():
            is_removed = not self._normalize(text[index]).strip()
            if is_removed and unicodedata.category(text[index])[0] not in "CM":
                self._refuse(text, index)
        encoding = self._without_normalizer.encode(normalized, add_special_tokens=False)
        lost = _not_space(normalized, uncovered(normalized.encode(), _offsets(encoding)))
        if lost.size:
            self._refuse(normalized, int(lost[0]))

    def _refuse(self, text: str, index: int) -> None:
        problem = f"drops {text[index]!r} (character {index + 1}), because it has no token"
        fix = "use a tokenizer with byte fallback or an unknown token, or data.tokenizer=bytes"
        raise ValueError(f"data.tokenizer={self._path!r} {problem}; {fix}")

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape, flattened), without special tokens.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.size).tolist(), skip_special_tokens=True)


def _open(path: str, content: bytes | None) -> tuple[Any, bytes]:
    """Returns the tokenizers.Tokenizer of a file, and the content of the file. Raises ValueError: see FileTokenizer."""
    try:
        import tokenizers
    except ImportError as error:
        fix = "run pip install 'ringattn[tokenizers]', or use data.tokenizer=bytes"
        raise ValueError(f"data.tokenizer={path!r} requires the package tokenizers; {fix}") from error
    try:
        content = read_small(expanded(path)) if content is None else content
    except OSError as error:
        fix = "use a readable tokenizer.json, or 'bytes'"
        raise ValueError(f"data.tokenizer={path!r} cannot be read ({error.strerror}); {fix}") from error
    try:
        return tokenizers.Tokenizer.from_buffer(content), content
    except Exception as error:  # tokenizers raises bare Exception
        fix, problem = "use a file saved by the package tokenizers, or 'bytes'", " ".join(str(error).split())
        raise ValueError(f"data.tokenizer={path!r} is not a valid tokenizer.json ({problem:.200}); {fix}") from error


def _switch_off(tokenizer: Any) -> list[str]:
    """Disables settings that would silently change documents. Returns the names of those that the file enables."""
    import tokenizers

    found = []
    model = tokenizer.model
    if isinstance(model, tokenizers.models.BPE) and model.dropout is not None:
        found += [f"dropout of {model.dropout:g}"] if model.dropout else []
        model.dropout = None
    if tokenizer.truncation is not None:
        found.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
    if tokenizer.padding is not None:
        found.append("padding")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return found


def _offsets(encoding: Any) -> np.ndarray:
    """Returns the first and last character (exclusive) of each token: [tokens, 2] int64."""
    return np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding)).reshape(-1, 2)


def _not_space(text: str, indices: np.ndarray) -> np.ndarray:
    """Returns the `indices` of characters that are not white space."""
    return np.array([index for index in indices.tolist() if not text[index].isspace()], np.int64)


def _encodes_all_bytes(vocabulary: dict[str, int], model: dict[str, Any], is_byte_level: bool) -> bool:
    """Returns True if every byte of UTF-8 text has a token, wherever it is in a word."""
    if any(model.get(name) for name in _AFFIXES) or not (is_byte_level or model.get("byte_fallback")):
        return False
    names = (_BYTE_LETTERS[byte] if is_byte_level else f"<0x{byte:02X}>" for byte in _UTF8_BYTES)
    return all(name in vocabulary for name in names)


def _types(part: Any) -> set[str]:
    """Returns the types of all normalizers and pre-tokenizers in a part of a tokenizer.json."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*map(_types, part.values()))
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


def _byte_letters() -> str:
    """Returns the 256 characters by which byte-level tokenizers represent bytes, in the order of the bytes (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


_BYTE_LETTERS = _byte_letters()


def _spellings(vocabulary: dict[str, int], size: int, model: dict[str, Any], is_byte_level: bool) -> list[bytes]:
    """Returns the usual text of each id as UTF-8: [size]."""
    spellings, byte_of = [b""] * size, {letter: byte for byte, letter in enumerate(_BYTE_LETTERS)}
    prefix, suffix = (model.get(name) or "" for name in _AFFIXES)
    for token, token_id in vocabulary.items():
        piece = token.removeprefix(prefix).removesuffix(suffix)
        if is_byte_level and byte_of.keys() >= set(piece):
            spellings[token_id] = bytes(byte_of[letter] for letter in piece)
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            spellings[token_id] = bytes([int(token[3:5], 16)])
        else:
            spellings[token_id] = piece.replace("\u2581", " ").encode()  # U+2581 represents a space
    return spellings
