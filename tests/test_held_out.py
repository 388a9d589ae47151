"""Held-out tokens: their share, what is split, and that no text is on both sides."""

import hashlib

import numpy as np
import pytest

from ringattn.data.corpus import DIGEST, Corpus, build_corpus, encode
from ringattn.data.formats import Document
from ringattn.data.held_out import TOLERANCE, describe_split, first_copies, held_out_lengths, split
from ringattn.data.tokenizer import ByteTokenizer


def document(name: str, size: int, prompt: int = 0) -> Document:
    """A document of `size` random bytes that depend on its name."""
    rng = np.random.default_rng(list(name.encode()))
    return Document(name, rng.integers(32, 127, size, np.uint8).tobytes(), prompt)


def numbered(count: int, size: int = 0) -> list[Document]:
    return [document(str(number), size or 11 * (1 + number % 7)) for number in range(count)]


def sides(documents: list[Document], fraction: float, unit: int = 1) -> tuple[Corpus, Corpus]:
    corpus, digests, *_ = build_corpus(encode(documents, ByteTokenizer()), ByteTokenizer())
    options = fraction, unit, "the data", corpus.masked_prefixes > 0
    return split(corpus, held_out_lengths(corpus.lengths, digests, *options))


def contents(corpus: Corpus) -> list[bytes]:
    """Returns the bytes of the pieces, without boundaries."""
    pieces = [corpus.tokens[start + np.arange(n)] for start, n in zip(corpus.starts, corpus.lengths, strict=True)]
    return [piece[piece < 256].astype(np.uint8).tobytes() for piece in pieces]


def share(training: Corpus, validation: Corpus) -> float:
    return validation.count / (training.count + validation.count)


def targets(corpus: Corpus) -> list[int]:
    """Returns the indices of all tokens that are targets with weight."""
    pieces = zip(corpus.starts, corpus.lengths, corpus.masked_prefixes, strict=True)
    return [int(start) + 1 + index for start, length, masked in pieces for index in range(masked, length)]


@pytest.mark.parametrize("draw", range(20))
def test_a_large_and_a_small_document_give_the_fraction(draw: int):
    """By documents, one of the two was held out whole: 2% or 98% of the text."""
    documents = [document(f"large {draw}", 20_000), document(f"small {draw}", 500)]
    training, validation = sides(documents, 0.05)
    assert share(training, validation) == pytest.approx(0.05, rel=0.01)
    assert not set(targets(training)) & set(targets(validation))
    assert len(targets(training)) + len(targets(validation)) == training.count + validation.count


@pytest.mark.parametrize("fraction", [0.002, 0.05, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("documents", [numbered(12, 1000), numbered(500), [document("one", 5000)]], ids=len)
def test_the_share_is_within_a_fifth(documents: list[Document], fraction: float):
    assert share(*sides(documents, fraction)) == pytest.approx(fraction, rel=TOLERANCE)


def test_whole_documents_are_held_out_if_they_give_the_fraction():
    documents = numbered(100, 50)
    training, validation = map(contents, sides(documents, 0.1))
    assert (len(training), len(validation)) == (90, 10)
    ranked = sorted(documents, key=lambda each: each.digest)
    assert set(validation) == {each.content for each in ranked[:10]}
    for side in (training, validation):
        assert side == [each.content for each in documents if each.content in side]  # in order


def test_adding_documents_keeps_most_of_what_is_held_out():
    few, many = (set(contents(sides(numbered(count, 50), 0.1)[1])) for count in (200, 220))
    assert (len(few), len(many)) == (20, 22)
    assert len(few & many) >= 18


def test_the_end_of_a_single_document_is_held_out_in_whole_units():
    content = bytes(range(100))
    assert list(map(contents, sides([Document("book", content)], 0.1))) == [[content[:90]], [content[90:]]]
    # One unit at least.
    assert list(map(contents, sides([Document("video", content)], 0.1, unit=20))) == [[content[:80]], [content[80:]]]
    assert list(map(contents, sides([Document("book", content)], 0.999))) == [[content[:1]], [content[1:]]]


def test_videos_are_split_between_frames():
    training, validation = sides(numbered(3, 1000), 0.1, unit=100)
    assert validation.lengths.tolist() == [300]
    assert sorted(training.lengths.tolist()) == [701, 1001, 1001]


def test_no_target_of_a_single_document_is_in_both_splits():
    training, validation = sides([Document("", bytes(range(100)), 95)], 0.1)
    assert (targets(training), targets(validation)) == ([], list(range(96, 102)))
    assert (training.masked_prefixes.tolist(), validation.masked_prefixes.tolist()) == ([91], [4])


def test_documents_with_prompts_are_not_split():
    documents = [document(str(number), 100, prompt=50) for number in range(3)]
    training, validation = sides(documents, 0.05)
    assert sorted(contents(training) + contents(validation)) == sorted(each.content for each in documents)
    assert validation.lengths.tolist() == [101]
    line = describe_split("data", [training], [validation], 3, 0.05, 1)
    assert line == (
        "data: 202 training tokens (66.7%) in 2 documents, 101 held-out tokens (33.3%, data.validation=0.05) "
        "in 1 document; documents with prompts are not split"
    )
    # A document without a prompt is split instead, although the others come first.
    first = max((document(f"text {number}", 3000) for number in range(20)), key=lambda each: each.digest)
    assert first.digest > max(each.digest for each in documents)
    training, validation = sides([*documents, first], 0.01)
    assert contents(validation) == [first.content[-33:]]


def described(split, documents, fraction, unit=1):
    training, validation = split
    return describe_split("data", [training], [validation], documents, fraction, unit)


def test_the_sizes_of_both_sides_are_described():
    documents = [document("large", 20_000), *numbered(2, 500)]
    training, validation = sides(documents, 0.05)
    line = describe_split("data", [training], [validation], 3, 0.05, 1)
    assert line.startswith(f"data: {training.count:,} training tokens (95.0%) in {training.starts.size} document")
    assert f", {validation.count:,} held-out tokens (5.0%, data.validation=0.05) in " in line
    assert line.endswith("the end of 1 document")
    line = described(sides(numbered(100, 50), 0.1), 100, 0.1)
    assert line.endswith(
        "4,590 training tokens (90.0%) in 90 documents, 510 held-out tokens (10.0%, "
        "data.validation=0.1) in 10 documents"
    )
    line = described(sides([document("film", 200)], 0.1, 100), 1, 0.1, unit=100)
    assert line.endswith("in the end of 1 document; videos are split only between frames")
    line = described(sides([document("a", 2)], 0.05), 1, 0.05)
    assert line.endswith("; the documents are too short to split")


def test_short_documents_leave_text_on_both_sides():
    for fraction in (0.0001, 0.9999):
        for size in (1, 2, 50):
            training, validation = sides(numbered(3, size), fraction)
            assert training.count > 0
            assert validation.count > 0
    with pytest.raises(
        ValueError,
        match="the data is a single document of 1 tokens or frames, too short to hold out its end; use a longer",
    ):
        sides([Document("short", b"x")], 0.5)


def digests(text: str) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.sha256(letter.encode()).digest() for letter in text), DIGEST)


def test_of_equal_documents_the_first_of_the_smallest_source_is_kept():
    kept, kept_of = first_copies([digests("abca"), digests("xc"), digests("c")])
    assert [each.tolist() for each in kept] == [[True, True, False, False], [True, False], [True]]
    assert kept_of.tolist() == [0, 1, 6, 0, 4, 6, 6]
    kept, kept_of = first_copies([digests("ab"), digests("ba")])
    assert [each.tolist() for each in kept] == [[True, True], [False, False]]
    assert kept_of.tolist() == [0, 1, 1, 0]
    # A source of many copies is smaller than one of few different documents.
    assert first_copies([digests("ab"), digests("aaa")])[0][0].tolist() == [False, True]
