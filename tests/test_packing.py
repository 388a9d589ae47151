import numpy as np
import pytest

from ringattn.data.corpus import Corpus
from ringattn.data.packing import Batch, PackedRows

BOUNDARY = 99


def corpus(*lengths: int, contexts: tuple[int, ...] = ()) -> Corpus:
    """Documents 10, 11, ... / 20, 21, ... / ... of the given lengths."""
    documents = [[BOUNDARY, *range(10 * d, 10 * d + n)] for d, n in enumerate(lengths, 1)]
    sizes = np.array([len(document) for document in documents], np.int64)
    tokens = np.array([*(token for document in documents for token in document), BOUNDARY], np.uint16)
    given = np.array(contexts or (0,) * len(lengths), np.int64)
    return Corpus(tokens, np.cumsum(sizes) - sizes, sizes, given)


def all_rows(packed: PackedRows) -> Batch:
    return packed.rows(np.arange(len(packed)))


def test_rows_by_hand():
    packed = PackedRows(corpus(2, 6, 1), 4, np.array([0, 1, 2]))
    assert len(packed) == 3
    tokens, targets, positions, segments, weights = all_rows(packed)
    assert tokens.tolist() == [[99, 10, 11, 99], [20, 21, 22, 23], [24, 25, 99, 30]]
    assert targets.tolist() == [[10, 11, 99, 20], [21, 22, 23, 24], [25, 99, 30, 99]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert segments.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert weights.tolist() == [[1.0] * 4] * 3
    assert {array.dtype.name for array in (tokens, targets, positions, segments)} == {"int32"}
    assert weights.dtype == np.float32


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 40])
def test_every_token_lies_once_in_order_and_predicts_the_next(seq_len: int):
    documents, order = corpus(3, 0, 9, 1, 5, 0, 8, 2), np.array([6, 1, 3, 0, 7, 5, 2, 4])
    places = [int(documents.starts[d]) + np.arange(int(documents.lengths[d])) for d in order]
    stream = np.concatenate([*(documents.tokens[each] for each in places), [BOUNDARY]])
    packed = PackedRows(documents, seq_len, order)
    batch = all_rows(packed)
    used = batch.tokens.size
    assert 0 <= len(stream) - 1 - used < seq_len
    assert batch.tokens.ravel().tolist() == stream[:used].tolist()
    assert batch.targets.ravel().tolist() == stream[1 : used + 1].tolist()


@pytest.mark.parametrize("seq_len", [1, 3, 7, 16])
def test_positions_restart_with_each_segment_and_each_boundary_opens_one(seq_len: int):
    batch = all_rows(PackedRows(corpus(3, 0, 9, 1, 5, 0, 8, 2), seq_len, np.arange(8)))
    for tokens, positions, segments in zip(batch.tokens, batch.positions, batch.segment_ids, strict=True):
        opens = tokens == BOUNDARY
        opens[0] = False
        assert segments.tolist() == np.cumsum(opens).tolist()
        for segment in np.unique(segments):
            assert positions[segments == segment].tolist() == list(range(np.sum(segments == segment)))


def test_a_row_does_not_need_the_others():
    packed = PackedRows(corpus(30, 2, 17, 5), 6, np.array([2, 0, 3, 1]))
    whole = all_rows(packed)
    some = packed.rows(np.array([7, 2, 2]))
    for part, full in zip(some, whole, strict=True):
        assert np.array_equal(part, full[[7, 2, 2]])


def test_no_row_beyond_the_end():
    packed = PackedRows(corpus(6), 4, np.array([0]))
    assert len(packed) == 1
    for number in (-1, 1):
        with pytest.raises(IndexError, match="of 1"):
            packed.rows(np.array([number]))


def test_what_is_given_and_what_is_not_known_has_no_weight():
    given = corpus(3, 5, contexts=(2, 0))._replace(unlearned=22)
    tokens, targets, _, _, weights = all_rows(PackedRows(given, 5, np.array([0, 1])))
    assert tokens.tolist() == [[99, 10, 11, 12, 99], [20, 21, 22, 23, 24]]
    assert targets.tolist() == [[10, 11, 12, 99, 20], [21, 22, 23, 24, 99]]
    # 10 and 11 are the prompt, 22 is never learned; what follows either is.
    assert weights.tolist() == [[0, 0, 1, 1, 1], [1, 0, 1, 1, 1]]


def test_a_prompt_longer_than_a_row_has_no_weight_in_any_row():
    weights = all_rows(PackedRows(corpus(11, contexts=(7,)), 4, np.array([0]))).weights
    assert weights.ravel().tolist() == [0] * 7 + [1] * 5


def test_a_piece_of_a_document_predicts_what_follows_it_there():
    whole = corpus(6, 2)
    pieces = whole._replace(starts=np.array([0, 4, 7]), lengths=np.array([4, 3, 3]), contexts=np.array([0, 2, 0]))
    tokens, targets, positions, segments, weights = PackedRows(pieces, 10, np.array([1, 2, 0])).rows(np.array([0]))
    assert tokens.tolist() == [[13, 14, 15, 99, 20, 21, 99, 10, 11, 12]]
    assert targets.tolist() == [[14, 15, 99, 20, 21, 99, 10, 11, 12, 13]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert weights.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
