"""What is held out, how long documents are cut, and tokens in several arrays read as one."""

import numpy as np
import pytest

from ringattn.data.corpus import Corpus, ShardedTokens, cut_long, encode, gather, split
from ringattn.data.dna import DnaTokenizer
from ringattn.data.formats import Document
from ringattn.data.tokenizer import ByteTokenizer


def numbered(count: int) -> list[Document]:
    return [Document(str(i), f"document {i} ".encode() * (1 + i % 7)) for i in range(count)]


def contents(corpus: Corpus) -> list[bytes]:
    """The pieces' bytes, without what opens a document."""
    pieces = [corpus.tokens[start + np.arange(n)] for start, n in zip(corpus.starts, corpus.lengths, strict=True)]
    return [piece[piece < 256].astype(np.uint8).tobytes() for piece in pieces]


def sides(documents: list[Document], share: float, unit: int = 1) -> tuple[list[bytes], list[bytes]]:
    corpus, digests, _ = gather(encode(documents, ByteTokenizer()), ByteTokenizer())
    training, validation = split(corpus, digests, share, unit, "the data")
    return contents(training), contents(validation)


def test_split_keeps_all_documents_apart_and_in_order():
    documents = [document.content for document in numbered(100)]
    training, validation = sides(numbered(100), 0.1)
    assert (len(training), len(validation)) == (90, 10)
    assert set(training) | set(validation) == set(documents)
    for side in (training, validation):
        assert side == sorted(side, key=documents.index)


def test_split_depends_on_the_contents_alone_and_equal_documents_stay_together():
    documents = numbered(50)
    copies = [Document("copy", document.content) for document in documents]
    training, validation = sides(copies + documents[::-1], 0.2)
    assert len(validation) == 20
    assert set(validation) == set(sides(documents, 0.2)[1])
    assert not set(training) & set(validation)


@pytest.mark.parametrize(("share", "held"), [(0.0001, 1), (0.9999, 2)])
def test_split_leaves_a_document_on_either_side(share: float, held: int):
    training, validation = sides(numbered(3), share)
    assert (len(training), len(validation)) == (3 - held, held)


def test_of_a_single_document_the_end_is_held_out_at_a_whole_unit():
    content = bytes(range(100))
    assert sides([Document("book", content)], 0.1) == ([content[:90]], [content[90:]])
    assert sides([Document("video", content)], 0.1, unit=20) == ([content[:80]], [content[80:]])  # at least one
    assert sides([Document("book", content)], 0.999) == ([content[:1]], [content[1:]])


def test_no_target_is_on_both_sides_of_a_single_document():
    corpus, digests, _ = gather(encode([Document("", bytes(range(100)), 95)], ByteTokenizer()), ByteTokenizer())
    training, validation = split(corpus, digests, 0.1, 1, "the data")
    targets = [
        corpus.tokens[each.starts[0] + 1 + np.arange(each.contexts[0], each.lengths[0])].tolist()
        for each in (training, validation)
    ]
    assert targets == [[], [95, 96, 97, 98, 99, 256]]
    assert (training.contexts.tolist(), validation.contexts.tolist()) == ([91], [4])


def test_split_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="all 5 documents are the same: leave one, or add others"):
        sides(numbered(1) * 5, 0.5)
    with pytest.raises(ValueError, match="the data is a single document of 1 tokens or frames: give more"):
        sides([Document("short", b"x")], 0.5)


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
def test_long_documents_are_cut_so_that_each_target_has_weight_once(overlap: int):
    lengths = np.array([40, 16, 3, 17, 1, 100], np.int64)
    starts = np.cumsum(lengths) - lengths
    corpus = Corpus(np.arange(lengths.sum() + 1), starts, lengths, np.array([20, 0, 1, 0, 1, 0]))
    cut = cut_long(corpus, 16, overlap)
    assert cut.lengths.max() == 16
    assert cut.lengths.min() >= 1
    weighted = [s + np.arange(c, n) for s, n, c in zip(cut.starts, cut.lengths, cut.contexts, strict=True)]
    wanted = [s + np.arange(c, n) for s, n, c in zip(starts, lengths, corpus.contexts, strict=True)]
    assert np.concatenate(weighted).tolist() == np.concatenate(wanted).tolist()
    later = ~np.isin(cut.starts, starts)
    assert (cut.contexts[later] >= overlap).all()
    assert later.sum() > 7


def test_a_prompt_is_context_and_its_tokens_come_first():
    corpus, *_ = gather(
        encode([Document("a", b"askanswer", 3), Document("b", b"text")], ByteTokenizer()), ByteTokenizer()
    )
    assert corpus.contexts.tolist() == [3, 0]
    assert corpus.unlearned is None
    assert gather(encode([Document("a", b"ACN")], DnaTokenizer()), DnaTokenizer())[0].unlearned == 4
    assert contents(corpus) == [b"askanswer", b"text"]


def test_a_document_that_cannot_be_encoded_is_named():
    class Utf8(ByteTokenizer):
        def encode(self, document: bytes) -> np.ndarray:
            return super().encode(document.decode("utf-8").encode())

    documents = [Document("good.txt", b"good"), Document("bad.txt", b"caf\xe9!")]
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 \(invalid .* at byte 3\): .* data.tokenizer=bytes"):
        list(encode(documents, Utf8()))
    with pytest.raises(ValueError, match=r"genome: 'X' at place 3 is no base"):
        list(encode([Document("genome", b"ACX")], DnaTokenizer()))


def test_several_arrays_are_read_as_one():
    whole = np.arange(1000, 1100, dtype=np.uint16)
    tokens = ShardedTokens([whole[:7], whole[7:7], whole[7:60], whole[60:]], "")
    assert (tokens.size, tokens.dtype) == (100, np.uint16)
    places = np.random.default_rng(0).integers(0, 100, (9, 33))
    assert np.array_equal(tokens[places], whole[places])
