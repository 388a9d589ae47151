import numpy as np
import pytest

from ringattn.data import Tokenizer, load_tokenizer
from ringattn.data.dna import DnaTokenizer


def test_bases_round_trip_in_capitals():
    tokenizer = load_tokenizer("dna")
    assert isinstance(tokenizer, DnaTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(b"ACGTacgtN")
    assert ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert ids.dtype == np.uint8
    assert tokenizer.decode([[5, *ids], [5, 0, 0, 1, 2, 3, 3, 3, 3, 3]]) == "ACGTACGTNAACGTTTTT"
    assert (tokenizer.size, tokenizer.boundary) == (6, 5)


def test_codes_for_several_bases_are_one_that_is_not_learned():
    tokenizer = DnaTokenizer()
    assert set(tokenizer.encode(b"RYSWKMBDHVNryswkmbdhvn").tolist()) == {tokenizer.unlearned}


@pytest.mark.parametrize(
    ("letter", "cure"), [("U", "write U as T"), ("X", "A C G T"), ("-", "A C G T"), ("\n", "A C G T")]
)
def test_what_is_no_base_is_named_with_its_place(letter: str, cure: str):
    with pytest.raises(ValueError, match=rf"'.*' at place 3 is no base: .*{cure}"):
        DnaTokenizer().encode(f"AC{letter}{letter}".encode())


def test_bases_are_no_bytes_of_text_and_other_ids_are_refused():
    tokenizer = DnaTokenizer()
    assert tokenizer.byte_length([0, 1, 5]) == 0
    with pytest.raises(ValueError, match="token id 6 is not in the vocabulary of 6"):
        tokenizer.decode([6])
