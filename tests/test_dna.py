import numpy as np
import pytest

from ringattn.data import Tokenizer, load_tokenizer
from ringattn.data.dna import DnaTokenizer


def test_bases_round_trip_in_upper_case():
    tokenizer = load_tokenizer("dna")
    assert isinstance(tokenizer, DnaTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(b"ACGTacgtN")
    assert ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert ids.dtype == np.uint8
    assert tokenizer.decode([[5, *ids], [5, 0, 0, 1, 2, 3, 3, 3, 3, 3]]) == "ACGTACGTNAACGTTTTT"
    assert (tokenizer.size, tokenizer.boundary) == (6, 5)


def test_ambiguous_bases_become_the_ignored_id():
    tokenizer = DnaTokenizer()
    assert set(tokenizer.encode(b"RYSWKMBDHVNryswkmbdhvn").tolist()) == {tokenizer.ignored_id}


@pytest.mark.parametrize(
    ("letter", "fix"), [("U", "write U as T"), ("X", "A, C, G, T"), ("-", "A, C, G, T"), ("\n", "A, C, G, T")]
)
def test_an_invalid_letter_is_named_with_its_position(letter: str, fix: str):
    with pytest.raises(ValueError, match=rf"'.*' at position 3 is not a base; .*{fix}"):
        DnaTokenizer().encode(f"AC{letter}{letter}".encode())


def test_bases_have_no_byte_length_and_invalid_ids_raise():
    tokenizer = DnaTokenizer()
    assert tokenizer.byte_lengths.tolist() == [0] * 6
    with pytest.raises(ValueError, match="token id 6 must be from 0 to 5, for a vocabulary of 6"):
        tokenizer.decode([6])
