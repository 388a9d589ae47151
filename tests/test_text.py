"""Streams of text: whole characters, whatever the bytes."""

import numpy as np
import pytest

from ringattn.data.tokenizer import ByteTokenizer
from ringattn.generation.text import MAX_HELD, REPLACEMENT, TextStream

TOKENIZER = ByteTokenizer()


def pieces_of(content: bytes) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER.decode)
    return [*(stream.add(byte) for byte in content), stream.finish()], stream


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界! 🙂🙃", "�", "a�b"])
def test_characters_are_never_split(text):
    pieces, stream = pieces_of(text.encode())
    assert "".join(pieces) == stream.text == text
    assert all(len(piece) <= 1 + (REPLACEMENT in piece) for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_invalid_bytes_split_no_later_character(seed):
    """Random bytes and characters: the stream is the text of all bytes, and holds back few of them."""
    random = np.random.default_rng(seed)
    choices = ["é".encode(), "世".encode(), "🙂".encode(), b"a", b"\xff", b"\x80", b"\xe4\xb8", b"\xf0"]
    content = b"".join(choices[number] for number in random.integers(0, len(choices), 200))
    pieces, stream = pieces_of(content)
    whole = TOKENIZER.decode(np.frombuffer(content, np.uint8).astype(np.int32))
    assert "".join(pieces) == stream.text == whole
    assert REPLACEMENT in whole
    shown = np.cumsum([len(piece) for piece in pieces[:-1]])
    for read in range(1, len(content) + 1):
        so_far = TOKENIZER.decode(np.frombuffer(content[:read], np.uint8).astype(np.int32))
        assert shown[read - 1] >= len(so_far) - MAX_HELD
