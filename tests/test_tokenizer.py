import numpy as np
import pytest

from ringattn.data import load_tokenizer
from ringattn.data.tokenizer import ByteTokenizer

TEXT = "def f(x):\n    return 'é 漢 🙂'\n" * 3


def test_bytes_round_trip_and_never_yield_the_boundary():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.size, tokenizer.boundary) == (257, 256)
    ids, corrections = tokenizer.align(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))
    assert tokenizer.encode(b"").tolist() == []
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [0]
    assert corrections.positions.size == 0


def test_bytes_decode_any_shape_without_boundaries_and_with_bad_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(np.array([[256, 97], [98, 256]])) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_ids_outside_the_vocabulary_raise():
    for bad in (-1, 257):
        with pytest.raises(ValueError, match=rf"token id {bad} must be from 0 to 256, for a vocabulary of 257"):
            ByteTokenizer().decode([0, bad])
