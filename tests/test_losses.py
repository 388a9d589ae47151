"""Losses by context on text of random bytes, with an oracle in place of a model."""

import numpy as np
import pytest
import tokenizers

from ringattn import config
from ringattn.data import load_tokenizer
from ringattn.data.corpus import build_corpus, encode
from ringattn.data.formats import Document
from ringattn.evaluation import losses
from ringattn.evaluation.report import tables
from ringattn.model.scoring import Scores


def test_by_context_scores_the_same_tokens_at_every_length():
    """Rows of every length end at the same tokens of the text."""
    c, tokenizer, rng = (
        config.Evaluation(lengths=(256, 384), batch_size=6),
        load_tokenizer("bytes"),
        np.random.default_rng(0),
    )
    scored = min(c.lengths) // 2
    documents = [Document(str(number), rng.bytes(700)) for number in range(3)]
    corpus, _, kinds, _ = build_corpus(encode(documents, tokenizer), tokenizer)
    text, last_targets = losses.Text([corpus], [kinds]), []

    def oracle(batches):
        for batch in batches:
            last_targets.append(batch.targets[:, -scored:])
            nats = np.zeros(batch.targets.shape, np.float32)
            nats[:, -scored:] = 1.0
            yield Scores(nats, batch.targets)

    for length in c.lengths:
        result = losses.by_context(oracle, c, text, length)
        assert result["loss"] == 1.0
        assert result["tokens"] == 3 * scored
    np.testing.assert_array_equal(*last_targets)


@pytest.mark.parametrize("measure", [losses.by_position, losses.by_kind], ids=["position", "kind"])
def test_bits_per_byte_count_the_source(tmp_path, measure):
    """The tokens of this vocabulary are lower-case words without white space, or unknown."""
    words = {"[UNK]": 0, "[SEP]": 1, "the": 2, "ring": 3}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    vocabulary.normalizer = tokenizers.normalizers.BertNormalizer()
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    vocabulary.add_special_tokens(["[SEP]"])
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    source = "The  RING, E\u0301cole 漢 of the ring\n" * 4
    corpus, _, kinds, _ = build_corpus(encode([Document("a.txt", source.encode())], tokenizer), tokenizer)

    def oracle(batches):
        for batch in batches:
            yield Scores(np.full(batch.targets.shape, np.log(2), np.float32), batch.targets)

    # One row with the boundary and all tokens but the last, which is its last target.
    result = measure(oracle, config.Evaluation(), losses.Text([corpus], [kinds]), corpus.count - 1)
    result = result["kinds"][0] if measure is losses.by_kind else result
    # The line break at the end belongs to the last token, which stands for " ring" and "\n".
    assert result["tokens"] == corpus.count - 1 == 8 * 4
    assert result["bits_per_byte"] == pytest.approx(8 * 4 / len(source.encode()), rel=1e-6)


def test_changes_are_paired_by_row():
    """Rows that are difficult at every length do not affect the change. Its error is that of paired differences."""
    results = [
        {"length": 8, "row_nats": [9.0, 90.0, 900.0], "row_tokens": [3.0, 3.0, 3.0], "row_documents": [0, 1, 2]},
        {"length": 4, "row_nats": [10.0, 92.0, 903.0], "row_tokens": [3.0, 3.0, 3.0], "row_documents": [0, 1, 2]},
    ]
    longer, shortest = losses.changes(results)
    # The rows change by -1, -2 and -3 nats: the standard error of their mean is 1 / sqrt(3), per row of 3 tokens.
    assert longer == {"loss": pytest.approx(-6 / 9), "error": pytest.approx(1 / 3**0.5 / 3)}
    assert shortest == {"loss": 0, "error": 0}
    two_documents = [result | {"row_documents": [0, 0, 1]} for result in results]  # -1 and -2 of one, -3 of the other
    assert losses.changes(two_documents)[0]["error"] == pytest.approx((2 * (1 + 1)) ** 0.5 / 9)
    one_document = [result | {"row_documents": [0, 0, 0]} for result in results]
    assert losses.changes(one_document)[0]["error"] is None
    figures = {
        "task": "loss_by_context",
        "depth": None,
        "loss": 1.0,
        "bits_per_byte": None,
        "accuracy": 0.5,
        "tokens": 9,
    }
    (table,) = tables({"run": [result | figures for result in results]})
    assert "| 8 | 1.0000 | 0.6667 ± 0.1925 | - | 50.0% | 9 | - | - |\n| 4 | 1.0000 | - | - |" in table
