import chex
import jax
import numpy as np
import pytest
import tokenizers
from test_file_tokenizer import train as make_tokenizer

from ringattn.data import question
from ringattn.data.corpus import Corpus, build_corpus, encode
from ringattn.data.dataset import load_tokenizer
from ringattn.data.formats import Document
from ringattn.data.packing import Batch, PackedRows

BOUNDARY = 99


def corpus(*lengths: int, masked_prefixes: tuple[int, ...] = ()) -> Corpus:
    """Returns documents 10, 11, ... / 20, 21, ... / ... of `lengths` tokens."""
    documents = [[BOUNDARY, *range(10 * d, 10 * d + n)] for d, n in enumerate(lengths, 1)]
    sizes = np.array([len(document) for document in documents], np.int64)
    tokens = np.array([*(token for document in documents for token in document), BOUNDARY], np.uint16)
    return Corpus(tokens, np.cumsum(sizes) - sizes, sizes, np.array(masked_prefixes or (0,) * len(lengths), np.int64))


def all_rows(packed: PackedRows) -> Batch:
    return packed.rows(np.arange(len(packed)))


def test_rows_by_hand():
    packed = PackedRows(corpus(2, 6, 1), 4, np.array([0, 1, 2]))
    assert len(packed) == 3
    tokens, targets, positions, segments, weights = all_rows(packed)
    assert segments is not None
    assert tokens.tolist() == [[99, 10, 11, 99], [20, 21, 22, 23], [24, 25, 99, 30]]
    assert targets.tolist() == [[10, 11, 99, 20], [21, 22, 23, 24], [25, 99, 30, 99]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert segments.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert weights.tolist() == [[1.0] * 4] * 3
    assert {array.dtype.name for array in (tokens, targets, positions, segments)} == {"int32"}
    assert weights.dtype == np.float32


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 40])
def test_every_token_occurs_once_in_order_and_predicts_the_next(seq_len: int):
    documents, order = corpus(3, 0, 9, 1, 5, 0, 8, 2), np.array([6, 1, 3, 0, 7, 5, 2, 4])
    indices = [int(documents.starts[d]) + np.arange(int(documents.lengths[d])) for d in order]
    stream = np.concatenate([*(documents.tokens[index] for index in indices), [BOUNDARY]])
    packed = PackedRows(documents, seq_len, order)
    batch = all_rows(packed)
    used = batch.tokens.size
    assert 0 <= len(stream) - 1 - used < seq_len
    assert batch.tokens.ravel().tolist() == stream[:used].tolist()
    assert batch.targets.ravel().tolist() == stream[1 : used + 1].tolist()


@pytest.mark.parametrize("seq_len", [1, 3, 7, 16])
def test_each_boundary_starts_a_segment_and_positions_restart(seq_len: int):
    batch = all_rows(PackedRows(corpus(3, 0, 9, 1, 5, 0, 8, 2), seq_len, np.arange(8)))
    assert batch.segment_ids is not None
    for tokens, positions, segments in zip(batch.tokens, batch.positions, batch.segment_ids, strict=True):
        starts = tokens == BOUNDARY
        starts[0] = False
        assert segments.tolist() == np.cumsum(starts).tolist()
        for segment in np.unique(segments):
            assert positions[segments == segment].tolist() == list(range(np.sum(segments == segment)))


def test_a_row_does_not_depend_on_the_others():
    packed = PackedRows(corpus(30, 2, 17, 5), 6, np.array([2, 0, 3, 1]))
    expected = jax.tree.map(lambda x: x[[7, 2, 2]], all_rows(packed))
    chex.assert_trees_all_equal(packed.rows(np.array([7, 2, 2])), expected)


@pytest.mark.parametrize("needed", [None, np.arange(12).reshape(2, 6) % 5 > 1], ids=["all", "needed"])
def test_without_separate_documents_a_row_is_one_sequence(needed):
    documents = corpus(30, 2, 17, 5, masked_prefixes=(7, 0, 3, 0))._replace(ignored_id=31 if needed is None else None)
    order, indices = np.array([2, 0, 3, 1]), np.array([8, 2])
    separate, joined = (PackedRows(documents, 6, order, value).rows(indices, needed) for value in (True, False))
    assert separate.segment_ids is not None
    assert separate.segment_ids.max() > 0
    assert joined.segment_ids is None
    assert joined.positions.tolist() == [list(range(6))] * 2
    assert joined.positions.dtype == np.int32
    ids = {"positions": separate.positions, "segment_ids": separate.segment_ids}
    chex.assert_trees_all_equal(joined._replace(**ids), separate)


def test_a_row_out_of_range_raises():
    packed = PackedRows(corpus(6), 4, np.array([0]))
    assert len(packed) == 1
    for index in (-1, 1):
        with pytest.raises(IndexError, match="are out of range for 1 rows"):
            packed.rows(np.array([index]))


def test_masked_prefixes_and_ignored_ids_have_zero_loss_weight():
    documents = corpus(3, 5, masked_prefixes=(2, 0))._replace(ignored_id=22)
    tokens, targets, _, _, weights = all_rows(PackedRows(documents, 5, np.array([0, 1])))
    assert tokens.tolist() == [[99, 10, 11, 12, 99], [20, 21, 22, 23, 24]]
    assert targets.tolist() == [[10, 11, 12, 99, 20], [21, 22, 23, 24, 99]]
    # 10 and 11 are a prompt, 22 is the ignored id; all other targets have weight 1.
    assert weights.tolist() == [[0, 0, 1, 1, 1], [1, 0, 1, 1, 1]]


def test_a_prompt_longer_than_a_row_is_masked_in_all_its_rows():
    weights = all_rows(PackedRows(corpus(11, masked_prefixes=(7,)), 4, np.array([0]))).weights
    assert weights.ravel().tolist() == [0] * 7 + [1] * 5


def test_a_piece_predicts_the_token_that_follows_in_its_document():
    whole = corpus(6, 2)
    pieces = whole._replace(
        starts=np.array([0, 4, 7]), lengths=np.array([4, 3, 3]), masked_prefixes=np.array([0, 2, 0])
    )
    tokens, targets, positions, segments, weights = PackedRows(pieces, 10, np.array([1, 2, 0])).rows(np.array([0]))
    assert segments is not None
    assert tokens.tolist() == [[13, 14, 15, 99, 20, 21, 99, 10, 11, 12]]
    assert targets.tolist() == [[14, 15, 99, 20, 21, 99, 10, 11, 12, 13]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert weights.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]


def test_a_begin_of_text_token_is_read_in_place_of_the_boundary(tmp_path):
    """The post-processor of the tokenizer puts it before a text, as those of Llama, Mistral and Gemma do."""
    inner = make_tokenizer(["<s>", "</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    documents, *_ = build_corpus(encode([Document("a", b"one"), Document("b", b"two")], tokenizer), tokenizer)
    rows = PackedRows(documents, documents.count, np.arange(2)).rows(np.arange(1))
    starts = rows.positions[0] == 0
    assert set(rows.tokens[0, starts]) == {0}
    assert 1 not in rows.tokens
    assert np.flatnonzero(rows.targets[0] == 1).tolist() == [*(np.flatnonzero(starts)[1:] - 1), documents.count - 1]
    assert tokenizer.decode(rows.tokens) == "onetwo"
    assert question("passkey", tokenizer, 128, 0.5, "1").tokens[0] == 0
