"""Split into training and validation, cutting of long documents, and tokens in several arrays."""

import numpy as np
import pytest

from ringattn.data.corpus import Corpus, ShardedTokens, build_corpus, cut_long, encode, split
from ringattn.data.dna import DnaTokenizer
from ringattn.data.formats import Document
from ringattn.data.tokenizer import ByteTokenizer


def numbered(count: int) -> list[Document]:
    return [Document(str(i), f"document {i} ".encode() * (1 + i % 7)) for i in range(count)]


def contents(corpus: Corpus) -> list[bytes]:
    """Returns the bytes of the pieces, without boundaries."""
    pieces = [corpus.tokens[start + np.arange(n)] for start, n in zip(corpus.starts, corpus.lengths, strict=True)]
    return [piece[piece < 256].astype(np.uint8).tobytes() for piece in pieces]


def split_contents(documents: list[Document], fraction: float, unit: int = 1) -> tuple[list[bytes], list[bytes]]:
    corpus, digests, _ = build_corpus(encode(documents, ByteTokenizer()), ByteTokenizer())
    training, validation = split(corpus, digests, fraction, unit, "the data")
    return contents(training), contents(validation)


def test_split_keeps_all_documents_in_order():
    documents = [document.content for document in numbered(100)]
    training, validation = split_contents(numbered(100), 0.1)
    assert (len(training), len(validation)) == (90, 10)
    assert set(training) | set(validation) == set(documents)
    for side in (training, validation):
        assert side == sorted(side, key=documents.index)


def test_split_depends_only_on_contents_and_keeps_identical_documents_together():
    documents = numbered(50)
    copies = [Document("copy", document.content) for document in documents]
    training, validation = split_contents(copies + documents[::-1], 0.2)
    assert len(validation) == 20
    assert set(validation) == set(split_contents(documents, 0.2)[1])
    assert not set(training) & set(validation)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0001, 1), (0.9999, 2)])
def test_each_split_has_at_least_one_document(fraction: float, held_out: int):
    training, validation = split_contents(numbered(3), fraction)
    assert (len(training), len(validation)) == (3 - held_out, held_out)


def test_the_end_of_a_single_document_is_held_out_in_whole_units():
    content = bytes(range(100))
    assert split_contents([Document("book", content)], 0.1) == ([content[:90]], [content[90:]])
    assert split_contents([Document("video", content)], 0.1, unit=20) == (
        [content[:80]],
        [content[80:]],
    )  # at least one
    assert split_contents([Document("book", content)], 0.999) == ([content[:1]], [content[1:]])


def test_no_target_of_a_single_document_is_in_both_splits():
    corpus, digests, _ = build_corpus(encode([Document("", bytes(range(100)), 95)], ByteTokenizer()), ByteTokenizer())
    training, validation = split(corpus, digests, 0.1, 1, "the data")
    targets = [
        corpus.tokens[part.starts[0] + 1 + np.arange(part.masked_prefixes[0], part.lengths[0])].tolist()
        for part in (training, validation)
    ]
    assert targets == [[], [95, 96, 97, 98, 99, 256]]
    assert (training.masked_prefixes.tolist(), validation.masked_prefixes.tolist()) == ([91], [4])


def test_impossible_splits_raise():
    with pytest.raises(
        ValueError, match="the data has 5 identical documents, so none can be held out; keep one, or add different"
    ):
        split_contents(numbered(1) * 5, 0.5)
    with pytest.raises(
        ValueError,
        match="the data is a single document of 1 tokens or frames, too short to hold out its end; use a longer",
    ):
        split_contents([Document("short", b"x")], 0.5)


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
