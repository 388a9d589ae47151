import json
import threading
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from ringattn.config import Data
from ringattn.data.corpus import Corpus, build_corpus, encode
from ringattn.data.formats import Document
from ringattn.data.loader import Loader, Packing, Seed, load, prefetch
from ringattn.data.tokenizer import ByteTokenizer


def numbered(count: int) -> list[Document]:
    return [Document(str(i), f"document {i} ".encode() * (1 + i % 7)) for i in range(count)]


@pytest.fixture
def corpus() -> Corpus:
    return corpus_of(numbered(40))


def corpus_of(documents: list[Document]) -> Corpus:
    return build_corpus(encode(documents, ByteTokenizer()), ByteTokenizer())[0]


def one_document(tokens: np.ndarray, boundary: int) -> Corpus:
    stored = np.array([boundary, *tokens, boundary], tokens.dtype)
    return Corpus(stored, np.array([0]), np.array([stored.size - 1]), np.array([0]))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def stream(loader: Loader, steps: int) -> np.ndarray:
    return np.concatenate([loader.batch(step).tokens for step in range(steps)]).reshape(-1, 16)


def test_rows_of_one_document_are_shuffled():
    loader = Loader([one_document(np.arange(4096, dtype=np.int32), 9999)], 16, 4, seed=0)
    starts = stream(loader, 64)[:, 0]
    assert len(set(starts.tolist())) == 256
    assert np.mean(np.diff(starts) == 16) < 0.05


def test_a_batch_is_a_function_of_seed_and_step(corpus: Corpus):
    loader = Loader([corpus], 16, 3, seed=7)
    batches = [loader.batch(step) for step in range(60)]
    again = Loader([corpus], 16, 3, seed=7)
    assert all(same(again.batch(step), batches[step]) for step in (59, 3, 41, 0, 17))
    assert not same(Loader([corpus], 16, 3, seed=8).batch(0), batches[0])
    assert {array.shape for array in jax.tree.leaves(batches[0])} == {(3, 16)}


def test_epochs_contain_all_documents_in_new_orders(corpus: Corpus):
    loader = Loader([corpus], 16, 5, seed=0)
    rows = loader.rows_per_epoch
    assert rows % 5, "this test needs an epoch that ends within a batch"
    tokens = stream(loader, rows)  # `rows` batches of 5 are exactly 5 epochs
    epochs = [tokens[e * rows : (e + 1) * rows].ravel() for e in range(5)]
    dropped = corpus.count - rows * 16
    for epoch in epochs:
        missing = np.bincount(corpus.tokens[np.arange(corpus.count)], minlength=257) - np.bincount(epoch, minlength=257)
        assert missing.min() >= 0
        assert missing.sum() == dropped < 16
    assert len({epoch.tobytes() for epoch in epochs}) == 5


def test_too_little_text_raises_with_fixes_that_work():
    corpus = one_document(np.zeros(99, np.uint16), 256)
    with pytest.raises(ValueError, match=r"100 tokens, so 0 rows of data.seq_len=128, fewer .*=4; .* at most 25$"):
        Loader([corpus], 128, 4, 0)
    message = r"training .* 2 rows .*; use more text, or data.seq_len of at most 33, or train.batch_size of at most 2$"
    with pytest.raises(ValueError, match=message):
        Loader([corpus], 50, 3, 0)
    assert (Loader([corpus], 33, 3, 0).rows_per_epoch, Loader([corpus], 50, 2, 0).rows_per_epoch) == (3, 2)
    with pytest.raises(ValueError, match=r"validation .* or a larger data.validation"):
        Loader([corpus], 50, 3, 0, "validation")


@pytest.mark.parametrize(
    ("seq_len", "batch_size", "seed", "message"),
    [(0, 1, 0, "data.seq_len=0"), (16, 0, 0, "train.batch_size=0"), (16, 1, -1, "train.seed=-1")],
)
def test_invalid_numbers_raise(corpus: Corpus, seq_len: int, batch_size: int, seed: int, message: str):
    with pytest.raises(ValueError, match=message):
        Loader([corpus], seq_len, batch_size, seed)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 7), (2, 12)])
def test_prefetch_yields_the_same_batches(corpus: Corpus, start: int, stop: int):
    loader = Loader([corpus], 16, 3, seed=1)
    batches = list(prefetch(loader, start, stop))
    assert len(batches) == stop - start
    assert all(same(batch, loader.batch(start + i)) for i, batch in enumerate(batches))


def test_prefetch_works_ahead_in_a_thread_that_ends_on_close(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    loader, made, compute = Loader([corpus], 16, 3, seed=1), [], Loader.batch

    def record(self: Loader, step: int, needed: None):
        made.append((step, threading.current_thread()))
        return compute(self, step)

    monkeypatch.setattr(Loader, "batch", record)
    batches = prefetch(loader, 0, 100)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    batches.close()
    assert [step for step, _ in made] == [0, 1, 2]
    assert made[0][1] is not threading.current_thread()
    assert not made[0][1].is_alive()


def test_prefetch_raises_errors_of_the_thread(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    loader, compute = Loader([corpus], 16, 3, seed=1), Loader.batch

    def fail(self: Loader, step: int, needed: None):
        return compute(self, step if step < 2 else 1 // 0)

    monkeypatch.setattr(Loader, "batch", fail)
    batches = prefetch(loader, 0, 9)
    assert [next(batches).tokens.shape for _ in range(2)] == [(3, 16)] * 2
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_validation_is_disjoint_and_equal_for_all_seeds(tmp_path: Path):
    # Document i repeats one letter, so that a token identifies its document.
    lines = [json.dumps({"text": chr(65 + i) * 50}) for i in range(40)]
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    data = Data(path=str(tmp_path / "letters.jsonl"), seq_len=16, validation=0.25)
    tokenizer, training, validation = load(data, 2, 0)
    loaders = (training, validation)
    seen = [set(stream(loader, loader.rows_per_epoch).ravel()) - {tokenizer.boundary} for loader in loaders]
    assert (len(seen[0]), len(seen[1])) == (30, 10)
    assert not seen[0] & seen[1]
    _, other_training, other_validation = load(data, 2, 1)
    assert same(validation.batch(0), other_validation.batch(0))
    assert not same(training.batch(0), other_training.batch(0))


def test_load_names_the_split_that_is_too_small(tmp_path: Path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i:03}" * 10)
    with pytest.raises(ValueError, match=r"the validation text has 31 tokens, .* or a larger data.validation"):
        load(Data(path=str(tmp_path), seq_len=16), 4, 0)


def letters(letter: str, count: int) -> Corpus:
    return corpus_of([Document(letter, letter.encode() * 30)] * count)


def test_stages_have_different_orders_and_stage_0_that_of_a_run_without_stages(corpus: Corpus):
    np.testing.assert_array_equal(np.random.PCG64([7, 5, 0]).random_raw(9), np.random.PCG64([7, 5]).random_raw(9))
    loader, mixture = Loader([corpus], 16, 3, seed=7), (1.0, 2.0)
    first, second = (Loader([corpus], 16, 3, Seed(7, stage)) for stage in (0, 1))
    assert same(first.batch(30), loader.batch(30))
    assert not same(second.batch(30), loader.batch(30))
    mixed, first, second = (
        Loader([corpus, corpus], 16, 6, seed, mixture=mixture) for seed in (7, Seed(7, 0), Seed(7, 1))
    )
    assert same(first.batch(3), mixed.batch(3))
    assert not same(second.batch(3), mixed.batch(3))


@pytest.mark.parametrize("mixture", [None, (1.0, 2.0)], ids=["one", "mixture"])
def test_batches_without_separate_documents_have_the_same_tokens(corpus: Corpus, mixture):
    corpora, packing = [corpus] * (1 if mixture is None else 2), Packing(overlap=2, separate_documents=False)
    separate = Loader(corpora, 16, 5, seed=0, packing=Packing(overlap=2), mixture=mixture)
    joined = Loader(corpora, 16, 5, seed=0, packing=packing, mixture=mixture)
    needed = np.random.default_rng(0).random((5, 16)) < 0.5
    for step in range(-(-separate.rows_per_epoch // 5) + 1):  # a batch spans two epochs
        expected, batch = separate.batch(step, needed), joined.batch(step, needed)
        assert batch.segment_ids is None
        assert batch.positions.tolist() == [list(range(16))] * 5
        ids = {"positions": expected.positions, "segment_ids": expected.segment_ids}
        chex.assert_trees_all_equal(batch._replace(**ids), expected)
    assert joined.fingerprint == separate.fingerprint
    assert joined.text_bytes(3).tolist() == separate.text_bytes(3).tolist()


def test_the_fingerprint_does_not_depend_on_seq_len(corpus: Corpus):
    for options in [{"packing": Packing(overlap=2)}, {"mixture": (1.0, 2.0)}, {}]:
        short, long = (Loader([corpus, corpus], length, 1, 0, **options) for length in (16, 32))
        assert short.fingerprint == long.fingerprint


def test_each_cycle_of_a_mixture_has_its_proportions():
    corpora = [letters("a", 8), letters("b", 50), letters("c", 9)]
    loader = Loader(corpora, 31, 4, seed=3, mixture=(3.0, 2.0, 5.0))
    rows = np.concatenate([loader.batch(step).tokens for step in range(25)])
    sources = np.where(rows[:, 0] == 256, rows[:, 1], rows[:, 0])
    for cycle in sources.reshape(-1, 10):
        assert np.bincount(cycle, minlength=100)[[97, 98, 99]].tolist() == [3, 2, 5]
    assert len({cycle.tobytes() for cycle in sources.reshape(-1, 10)}) > 1
    again = Loader(corpora, 31, 4, seed=3, mixture=(3.0, 2.0, 5.0))
    assert all(same(again.batch(step), loader.batch(step)) for step in (24, 3, 0))
    assert loader.rows_per_epoch == 10  # then the 9 rows of c, 5 per cycle, repeat


def test_a_mixture_keeps_the_order_of_each_source():
    numbers = np.arange(640, dtype=np.int32)
    one, other = one_document(numbers, 9999), one_document(numbers + 1000, 9999)
    mixed, alone = Loader([one, other], 16, 4, 0, mixture=(1.0, 3.0)), Loader([one], 16, 1, 0)
    rows = np.concatenate([mixed.batch(step).tokens for step in range(20)])
    rows_of_one = rows[rows[:, 1] < 1000]
    assert len(rows_of_one) == 20
    assert rows_of_one.tolist() == [alone.batch(step).tokens[0].tolist() for step in range(20)]


def test_without_a_mixture_each_row_occurs_once_per_epoch():
    loader = Loader([letters("a", 8), letters("b", 50)], 31, 2, seed=0)
    assert loader.rows_per_epoch == 58
    rows = np.concatenate([loader.batch(step).tokens for step in range(29)])
    assert np.bincount(rows.max(1, where=rows < 256, initial=0))[[97, 98]].tolist() == [8, 50]


def test_a_source_without_a_row_raises_and_few_rows_still_make_a_batch():
    with pytest.raises(
        ValueError,
        match=r"a source of the validation text has 31 tokens, so it has no full row of data.seq_len=32; use more text",
    ):
        Loader([letters("a", 40), letters("b", 1)], 32, 4, 0, "validation")
    assert Loader([letters("a", 2), letters("b", 2)], 31, 8, 0, mixture=(1.0, 1.0)).batch(0).tokens.shape == (8, 31)


def test_text_that_consists_only_of_prompts_raises():
    corpus = corpus_of([Document("asked", b"x" * 64, prompt=64)])
    with pytest.raises(
        ValueError,
        match=r"the validation text consists only of prompts, which are masked out of the loss; use more text",
    ):
        Loader([corpus._replace(lengths=corpus.lengths - 1)], 16, 1, 0, "validation")
    assert Loader([corpus], 16, 1, 0).rows_per_epoch == 4  # the final boundary is a target


def test_overlap_gives_each_piece_a_row_and_counts_each_target_once():
    corpus = corpus_of([Document("long", bytes(range(100))), Document("short", b"xyz" * 3)])
    loader = Loader([corpus], 16, 1, seed=0, packing=Packing(overlap=4))
    rows = [loader.batch(step) for step in range(loader.rows_per_epoch)]
    full = [row for row in rows if not np.any(row.segment_ids)]
    assert len(full) >= 7
    starts = sorted(int(row.tokens[0, 0]) for row in full if row.tokens[0, 0] != 256)
    assert starts[:6] == [11, 23, 35, 47, 59, 71]  # offset by the boundary
    assert all(row.weights[0].tolist() == [0] * 4 + [1] * 12 for row in full if row.tokens[0, 0] in starts[:6])
    unmasked = np.concatenate([row.targets[row.weights > 0] for row in full])
    assert len(set(unmasked.tolist())) == unmasked.size


def test_the_fingerprint_changes_with_tokens_pieces_and_mixture():
    corpus = corpus_of(numbered(40))
    tokens = np.array(corpus.tokens[np.arange(corpus.count + 1)])
    tokens[5] += 1
    shorter = corpus.lengths.copy()
    shorter[3] -= 1
    fingerprints = {
        Loader([corpus], 16, 2, 0).fingerprint,
        Loader([corpus._replace(tokens=tokens)], 16, 2, 0).fingerprint,
        Loader([corpus._replace(lengths=shorter)], 16, 2, 0).fingerprint,
        Loader([corpus, corpus], 16, 2, 0, mixture=(1.0, 2.0)).fingerprint,
        Loader([corpus, corpus], 16, 2, 0, mixture=(2.0, 1.0)).fingerprint,
    }
    assert len(fingerprints) == 5
    assert Loader([corpus], 16, 2, 1).fingerprint in fingerprints
