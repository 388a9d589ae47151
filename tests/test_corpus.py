"""Documents as tokens, cutting of long documents, and tokens in several arrays."""

import numpy as np
import pytest

from ringattn.data.corpus import Corpus, ShardedTokens, build_corpus, cut_long, encode
from ringattn.data.dna import DnaTokenizer
from ringattn.data.formats import Document
from ringattn.data.tokenizer import ByteTokenizer


def contents(corpus: Corpus) -> list[bytes]:
    """Returns the bytes of the pieces, without boundaries."""
    pieces = [corpus.tokens[start + np.arange(n)] for start, n in zip(corpus.starts, corpus.lengths, strict=True)]
    return [piece[piece < 256].astype(np.uint8).tobytes() for piece in pieces]


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
def test_cut_documents_count_each_target_once_in_the_loss(overlap: int):
    lengths = np.array([40, 16, 3, 17, 1, 100], np.int64)
    starts = np.cumsum(lengths) - lengths
    corpus = Corpus(np.arange(lengths.sum() + 1), starts, lengths, np.array([20, 0, 1, 0, 1, 0]))
    cut = cut_long(corpus, 16, overlap)
    assert cut.lengths.max() == 16
    assert cut.lengths.min() >= 1
    unmasked = [s + np.arange(c, n) for s, n, c in zip(cut.starts, cut.lengths, cut.masked_prefixes, strict=True)]
    expected = [s + np.arange(c, n) for s, n, c in zip(starts, lengths, corpus.masked_prefixes, strict=True)]
    assert np.concatenate(unmasked).tolist() == np.concatenate(expected).tolist()
    later = ~np.isin(cut.starts, starts)
    assert (cut.masked_prefixes[later] >= overlap).all()
    assert later.sum() > 7


def test_a_prompt_is_masked():
    corpus, *_ = build_corpus(
        encode([Document("a", b"askanswer", 3), Document("b", b"text")], ByteTokenizer()), ByteTokenizer()
    )
    assert corpus.masked_prefixes.tolist() == [3, 0]
    assert corpus.ignored_id is None
    assert build_corpus(encode([Document("a", b"ACN")], DnaTokenizer()), DnaTokenizer())[0].ignored_id == 4
    assert contents(corpus) == [b"askanswer", b"text"]


def test_an_invalid_document_is_named():
    class Utf8(ByteTokenizer):
        def encode(self, document: bytes) -> np.ndarray:
            return super().encode(document.decode("utf-8").encode())

    documents = [Document("good.txt", b"good"), Document("bad.txt", b"caf\xe9!")]
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 \(invalid .* at byte 3\); .* data.tokenizer=bytes"):
        list(encode(documents, Utf8()))
    with pytest.raises(ValueError, match=r"genome: 'X' at position 3 is not a base"):
        list(encode([Document("genome", b"ACX")], DnaTokenizer()))


def test_several_arrays_are_indexed_as_one():
    expected = np.arange(1000, 1100, dtype=np.uint16)
    tokens = ShardedTokens([expected[:7], expected[7:7], expected[7:60], expected[60:]], "")
    assert (tokens.size, tokens.dtype) == (100, np.uint16)
    indices = np.random.default_rng(0).integers(0, 100, (9, 33))
    assert np.array_equal(tokens[indices], expected[indices])
