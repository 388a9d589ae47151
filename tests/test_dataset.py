"""Documents that are in several files or paths are used once, and the sizes of both sides are reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_held_out import contents, document

from ringattn.config import Data
from ringattn.data import Splits, prepare, read
from ringattn.data.loader import load


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_bytes(document(str(number), 400).content)
    return tmp_path / "text"


def texts(splits: Splits) -> list[bytes]:
    """Returns the whole text of all documents, of both sides."""
    return [text for side in (splits.training, splits.validation) for corpus in side for text in contents(corpus)]


def windows(corpora, length: int = 20) -> set[bytes]:
    found = (text for corpus in corpora for text in contents(corpus))
    return {text[index : index + length] for text in found for index in range(len(text) - length + 1)}


def paths_of(directory: Path, case: str) -> tuple[str, ...]:
    everything, one = str(directory), str(directory / "3.txt")
    if case == "JSONL":
        lines = [json.dumps({"text": document(f"line {number}", 50).content.decode()}) for number in range(30)]
        for name, part in (("a", lines[:20]), ("b", lines[10:])):
            (directory.parent / f"{name}.jsonl").write_text("\n".join(part))
        return str(directory.parent / "a.jsonl"), str(directory.parent / "b.jsonl")
    if case == "shards":
        prepare(Data(path=everything), str(directory.parent / "shards"))
        return str(directory.parent / "shards"), one
    return {"file": (everything, one), "reversed": (one, everything), "twice": (everything, everything)}[case]


@pytest.mark.parametrize(
    ("case", "documents", "copies"),
    [("file", 8, 1), ("reversed", 8, 1), ("twice", 8, 8), ("JSONL", 30, 10), ("shards", 8, 1)],
)
def test_a_document_in_two_paths_is_used_once(directory: Path, case: str, documents: int, copies: int):
    splits = read(Data(path=paths_of(directory, case), validation=0.2))
    assert sum(map(len, texts(splits))) == {8: 8 * 400, 30: 30 * 50}[documents]
    assert not windows(splits.training) & windows(splits.validation)
    (line,) = [line for line in splits.notes if "duplicates" in line]
    assert line.startswith(f"data: skipped {copies} of {documents + copies} documents, duplicates of others; e.g. ")
    assert line.endswith("; to use a path more often, set data.mixture")


def test_the_example_names_both_documents(directory: Path):
    paths = paths_of(directory, "file")
    assert read(Data(path=paths)).notes[-1] == (
        f"data: skipped 1 of 9 documents, duplicates of others; e.g. {paths[1]} (data.path={paths[0]!r}) is the same "
        f"as {paths[1]} (data.path={paths[1]!r}); to use a path more often, set data.mixture"
    )
    (directory / "copy.txt").write_bytes((directory / "5.txt").read_bytes())
    assert read(Data(path=str(directory))).notes[1:] == [
        f"data: skipped 1 of 9 documents, duplicates of others; e.g. {directory}/copy.txt is the same "
        f"as {directory}/5.txt"
    ]
    assert "document 4 of" in read(Data(path=paths_of(directory, "shards"))).notes[-1]


def test_without_copies_all_documents_are_used(directory: Path):
    splits = read(Data(path=str(directory), validation=0.25))
    assert sorted(texts(splits)) == sorted(document(str(number), 400).content for number in range(8))
    assert splits.notes == [
        "data: 2,406 training tokens (75.0%) in 6 documents, 802 held-out tokens (25.0%, data.validation=0.25) "
        "in 2 documents"
    ]
    assert splits.kinds == [[".txt", ".txt"]]


def test_a_file_keeps_its_share_of_a_mixture_with_its_directory(directory: Path):
    data = Data(path=paths_of(directory, "file"), mixture=(1.0, 1.0), validation=0.2, seq_len=16)
    splits = read(data)
    assert [corpus.count for corpus in splits.training] == [pytest.approx(0.8 * 7 * 401, rel=0.05), 321]
    assert load(data, 2, 0)[1].batch(0).tokens.shape == (2, 16)
    with pytest.raises(
        ValueError, match=r"all of its 8 documents are also in other paths, so data.mixture has nothing to draw from it"
    ):
        read(replace(data, path=paths_of(directory, "twice")))


def test_several_paths_are_described_one_by_one(directory: Path):
    (directory.parent / "large.txt").write_bytes(document("large", 9000).content)
    paths = (str(directory), str(directory.parent / "large.txt"))
    splits = read(Data(path=paths, validation=0.1))
    assert [line.split(": ")[0] for line in splits.notes] == ["data", *(f"data.path={path!r}" for path in paths)]
    for training, validation in zip(splits.training, splits.validation, strict=True):
        assert validation.count / (training.count + validation.count) == pytest.approx(0.1, rel=0.2)
    assert splits.notes[2].endswith("900 held-out tokens (10.0%, data.validation=0.1) in the end of 1 document")


def test_shards_hold_out_the_same_text_as_their_source(directory: Path):
    prepare(Data(path=str(directory)), str(directory.parent / "shards"))
    for fraction in (0.03, 0.3):
        data = Data(path=str(directory), validation=fraction)
        source, shards = read(data), read(replace(data, path=str(directory.parent / "shards")))
        assert texts(source) == texts(shards)
        assert source.notes == shards.notes


def test_genomes_hold_out_the_fraction(directory: Path):
    rng = np.random.default_rng(0)
    records = [f">r{size}\n{''.join(rng.choice(list('ACGT'), size))}\n" for size in (10_000, 6000, 300)]
    (directory.parent / "g.fa").write_text("".join(records))
    data = Data(path=str(directory.parent / "g.fa"), tokenizer="dna", validation=0.05)
    (training,), (validation,) = read(data)[1:3]
    assert validation.count / (training.count + validation.count) == pytest.approx(0.05, rel=0.2)
