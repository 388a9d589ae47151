import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ringattn.config import Data
from ringattn.data.loader import Loader, load, prefetch, split, tokenize
from ringattn.data.packing import Corpus, concatenate
from ringattn.data.sources import Document
from ringattn.data.tokenizer import ByteTokenizer


def numbered(count: int) -> list[Document]:
    return [Document(str(i), f"document {i} ".encode() * (1 + i % 7)) for i in range(count)]


@pytest.fixture
def corpus() -> Corpus:
    return tokenize(numbered(40), ByteTokenizer())


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def stream(loader: Loader, steps: int) -> np.ndarray:
    return np.concatenate([loader.batch(step).tokens for step in range(steps)]).reshape(-1, 16)


def test_split_keeps_all_documents_apart_and_in_order():
    documents = numbered(100)
    training, validation = split(documents, 0.1)
    assert (len(training), len(validation)) == (90, 10)
    assert sorted(training + validation, key=lambda d: int(d.name)) == documents
    assert training == sorted(training, key=lambda d: int(d.name))
    assert not {d.content for d in training} & {d.content for d in validation}


def test_split_depends_on_the_contents_alone_and_equal_documents_stay_together():
    documents = numbered(50)
    copies = [Document("copy", document.content) for document in documents]
    training, validation = split(copies + documents[::-1], 0.2)
    assert len(validation) == 20
    assert {d.content for d in validation} == {d.content for d in split(documents, 0.2)[1]}
    assert not {d.content for d in training} & {d.content for d in validation}


@pytest.mark.parametrize(("share", "held"), [(0.0001, 1), (0.9999, 2)])
def test_split_leaves_a_document_on_either_side(share: float, held: int):
    training, validation = split(numbered(3), share)
    assert (len(training), len(validation)) == (3 - held, held)


@pytest.mark.parametrize("text", ["a line of text\n" * 100, "no line ends here, but ünïcode " * 50])
def test_of_a_single_document_the_end_is_held_out(text: str):
    (training,), (validation,) = split([Document("book.txt", text.encode())], 0.1)
    assert training.content + validation.content == text.encode()
    assert 0.08 < len(validation.content) / len(text.encode()) < 0.16
    assert validation.content.decode().startswith("a line") or "\n" not in text


def test_split_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="all 5 documents are the same text: leave one, or add others"):
        split(numbered(1) * 5, 0.5)
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"data.validation={share} must lie between 0 and 1: use 0.05"):
            split(numbered(3), share)


def test_rows_of_one_document_do_not_follow_one_another():
    loader = Loader(concatenate([np.arange(4096, dtype=np.int32)], boundary=9999), 16, 4, seed=0)
    starts = stream(loader, 64)[:, 0]
    assert len(set(starts.tolist())) == 256
    assert np.mean(np.diff(starts) == 16) < 0.05


def test_batch_is_a_function_of_seed_and_step(corpus: Corpus):
    loader = Loader(corpus, 16, 3, seed=7)
    batches = [loader.batch(step) for step in range(60)]
    again = Loader(corpus, 16, 3, seed=7)
    assert all(same(again.batch(step), batches[step]) for step in (59, 3, 41, 0, 17))
    assert not same(Loader(corpus, 16, 3, seed=8).batch(0), batches[0])
    assert all(array.shape == (3, 16) for array in batches[0])


def test_epochs_hold_all_documents_in_new_orders_and_join_without_a_loss(corpus: Corpus):
    loader = Loader(corpus, 16, 5, seed=0)
    rows = loader.rows_per_epoch
    assert rows % 5, "an epoch's end must fall inside a batch for this test"
    dealt = stream(loader, rows)  # `rows` batches of 5 are exactly 5 epochs
    epochs = [dealt[e * rows : (e + 1) * rows].ravel() for e in range(5)]
    left = corpus.tokens.size - rows * 16
    for epoch in epochs:
        missing = np.bincount(corpus.tokens, minlength=257) - np.bincount(epoch, minlength=257)
        assert missing.min() >= 0
        assert missing.sum() == left < 16
    assert len({epoch.tobytes() for epoch in epochs}) == 5


def test_text_without_a_batch_of_rows_is_refused_with_cures_that_work():
    corpus = concatenate([np.zeros(99, np.uint16)], 256)
    with pytest.raises(ValueError, match=r"100 tokens, so 0 rows of data.seq_len=128, fewer .*=4: .* at most 25$"):
        Loader(corpus, 128, 4, 0)
    message = r"training .* 2 rows .*: use more text, or data.seq_len of at most 33, or train.batch_size of at most 2$"
    with pytest.raises(ValueError, match=message):
        Loader(corpus, 50, 3, 0)
    assert (Loader(corpus, 33, 3, 0).rows_per_epoch, Loader(corpus, 50, 2, 0).rows_per_epoch) == (3, 2)
    with pytest.raises(ValueError, match=r"validation .* or a larger data.validation"):
        Loader(corpus, 50, 3, 0, "validation")


@pytest.mark.parametrize(
    ("seq_len", "batch_size", "seed", "message"),
    [(0, 1, 0, "data.seq_len=0"), (16, 0, 0, "train.batch_size=0"), (16, 1, -1, "train.seed=-1")],
)
def test_senseless_numbers_are_refused(corpus: Corpus, seq_len: int, batch_size: int, seed: int, message: str):
    with pytest.raises(ValueError, match=message):
        Loader(corpus, seq_len, batch_size, seed)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 7), (2, 12)])
def test_prefetch_gives_the_same_batches(corpus: Corpus, start: int, stop: int):
    loader = Loader(corpus, 16, 3, seed=1)
    batches = list(prefetch(loader, start, stop))
    assert len(batches) == stop - start
    assert all(same(batch, loader.batch(start + i)) for i, batch in enumerate(batches))


def test_prefetch_works_ahead_in_a_thread_that_ends_with_it(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    loader, made, compute = Loader(corpus, 16, 3, seed=1), [], Loader.batch

    def record(self: Loader, step: int):
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


def test_prefetch_raises_what_the_thread_raised(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    loader, compute = Loader(corpus, 16, 3, seed=1), Loader.batch

    def fail(self: Loader, step: int):
        return compute(self, step if step < 2 else 1 // 0)

    monkeypatch.setattr(Loader, "batch", fail)
    batches = prefetch(loader, 0, 9)
    assert [next(batches).tokens.shape for _ in range(2)] == [(3, 16)] * 2
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_load_keeps_validation_apart_and_equal_for_all_seeds(tmp_path: Path):
    # Document i is made of one letter, so that a token says where it comes from.
    lines = [json.dumps({"text": chr(65 + i) * 50}) for i in range(40)]
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    data = Data(path=str(tmp_path / "letters.jsonl"), seq_len=16, validation=0.25)
    tokenizer, training, validation = load(data, 2, 0)
    seen = [set(stream(one, one.rows_per_epoch).ravel()) - {tokenizer.boundary} for one in (training, validation)]
    assert (len(seen[0]), len(seen[1])) == (30, 10)
    assert not seen[0] & seen[1]
    _, other_training, other_validation = load(data, 2, 1)
    assert same(validation.batch(0), other_validation.batch(0))
    assert not same(training.batch(0), other_training.batch(0))


def test_load_names_the_side_that_is_too_small(tmp_path: Path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i:03}" * 10)
    with pytest.raises(ValueError, match=r"the validation text holds 31 tokens, .* or a larger data.validation"):
        load(Data(path=str(tmp_path), seq_len=16), 4, 0)


def test_document_in_the_wrong_encoding_is_named():
    class Utf8(ByteTokenizer):
        def encode(self, document: bytes) -> np.ndarray:
            return super().encode(document.decode("utf-8").encode())

    documents = [Document("good.txt", b"good"), Document("bad.txt", b"caf\xe9!")]
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 \(invalid .* at byte 3\): .* data.tokenizer=bytes"):
        tokenize(documents, Utf8())


def test_each_stage_has_an_order_of_its_own_and_the_first_that_of_a_run_without(corpus: Corpus):
    loader = Loader(corpus, 16, 3, seed=7)
    np.testing.assert_array_equal(np.random.PCG64([7, 5, 0]).random_raw(9), np.random.PCG64([7, 5]).random_raw(9))
    again, other = loader.recut(16, 3, stage=0), loader.recut(16, 3, stage=1)
    assert same(again.batch(30), loader.batch(30))
    assert not same(other.batch(30), loader.batch(30))
    assert other.fingerprint == loader.fingerprint
    longer = loader.recut(32, 2, stage=1)
    assert longer.batch(0).tokens.shape == (2, 32)
    assert same(longer.batch(4), Loader(corpus, 32, 2, seed=7, stage=1).batch(4))
    with pytest.raises(ValueError, match=r"the training text holds .* 0 rows of data.seq_len=9999"):
        loader.recut(9999, 1, stage=1)
