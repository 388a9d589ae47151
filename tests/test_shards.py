"""Shards return the tokens that were written, or name the file that was changed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest

from ringattn.config import Data
from ringattn.data.corpus import build_corpus, encode
from ringattn.data.dna import DnaTokenizer
from ringattn.data.formats import Document
from ringattn.data.loader import load
from ringattn.data.shards import are_shards, open_shards, write_shards
from ringattn.data.sources import read_documents
from ringattn.data.text_bytes import TABLE
from ringattn.data.tokenizer import ByteTokenizer
from ringattn.data.video import as_npy

DOCUMENTS = [Document(f"d{i}", bytes([65 + i]) * (i * 37 % 50 + 1), prompt=i % 3) for i in range(20)]


def written(directory: Path, documents=DOCUMENTS, tokenizer=None, shard_tokens: int = 100) -> Path:
    tokenizer = tokenizer or ByteTokenizer()
    calls = []
    write_shards(
        directory,
        encode(documents, tokenizer),
        tokenizer,
        Data(),
        lambda *counts: calls.append(counts),
        shard_tokens=shard_tokens,
    )
    assert len(calls) == len(documents)
    return directory


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 10**6])
def test_shards_return_the_written_tokens(tmp_path: Path, shard_tokens: int):
    shards = open_shards(written(tmp_path / "s", shard_tokens=shard_tokens))
    corpus, digests, *_ = build_corpus(encode(DOCUMENTS, ByteTokenizer()), ByteTokenizer())
    opened = shards.read(ByteTokenizer()).corpus
    indices = np.arange(corpus.count + 1)
    assert np.array_equal(opened.tokens[indices], corpus.tokens[indices])
    for name in ("starts", "lengths", "masked_prefixes"):
        assert np.array_equal(getattr(opened, name), getattr(corpus, name))
    assert np.array_equal(shards.digests, digests)
    count = len(list((tmp_path / "s").glob("shard-*.bin")))
    assert count == -(-corpus.count // shard_tokens)  # the final boundary is never a shard of its own
    assert are_shards(str(tmp_path / "s"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_tokens_are_memory_mapped(tmp_path: Path):
    shards = open_shards(written(tmp_path / "s"))
    assert all(isinstance(array, np.memmap) for array in shards.tokens._arrays)


def test_verifying_large_shards_is_reported(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    directory = written(tmp_path / "s")
    open_shards(directory)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("ringattn.data.shards._LARGE", 1)
    open_shards(directory)
    assert f"verifying 0.0 GB of shards in {directory}" in capsys.readouterr().out


def test_shards_give_the_same_batches_as_their_source(tmp_path: Path):
    lines = [json.dumps({"prompt": "p" * (i % 4), "completion": f"answer {i} " * 9}) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = Data(path=str(tmp_path / "t.jsonl"), seq_len=16, validation=0.2, overlap=3)
    (tmp_path / "genome.fa").write_bytes(b">a\n" + b"ACGTNNGT" * 100)
    genome = Data(path=str(tmp_path / "genome.fa"), seq_len=16, validation=0.2, tokenizer="dna")
    for data, tokenizer in ((source, ByteTokenizer()), (genome, DnaTokenizer())):
        directory = tmp_path / tokenizer.name
        write_shards(directory, encode(read_documents(str(data.path)), tokenizer), tokenizer, data, lambda *_: None, 99)
        from_shards = Data(**{**vars(data), "path": str(directory)})
        for loader, other in zip(load(data, 2, 5)[1:], load(from_shards, 2, 5)[1:], strict=True):
            assert loader.rows_per_epoch == other.rows_per_epoch
            for step in range(loader.rows_per_epoch):
                chex.assert_trees_all_equal(loader.batch(step), other.batch(step))


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00003.bin", "documents.npy", "text_bytes.npy"])
def test_a_changed_file_is_named(tmp_path: Path, name: str):
    original = written(tmp_path / "original")
    for index, (damage, message) in enumerate(
        [
            (lambda path: flip_bit(path, path.stat().st_size // 2), "has changed since it was written"),
            (lambda path: os.truncate(path, path.stat().st_size - 1), r"has \d+ bytes instead of \d+"),
            (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"has \d+ bytes instead of \d+"),
            (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
        ]
    ):
        directory = shutil.copytree(original, tmp_path / str(index))
        damage(directory / name)
        assert are_shards(str(directory))
        with pytest.raises(
            ValueError,
            match=rf"/{index}/{name} {message}; .*remove the directory and write it again with scripts/prepare.py",
        ):
            open_shards(directory)


def change(directory: Path, edit) -> None:
    index = json.loads((directory / "index.json").read_text())
    edit(index)
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: index.update(format="other"),
        lambda index: index.pop("files"),
        lambda index: index.update(dtype="object"),
        lambda index: index["files"][0].update(name="../shard-00000.bin"),
        lambda index: index["files"][0].update(name="/etc/passwd"),
        lambda index: index["files"][0].update(name=".hidden"),
        lambda index: index["files"][0].update(tokens="many"),
        lambda index: index.update(files=[3]),
        lambda index: index.update(tokenizer="bytes"),
    ],
)
def test_an_invalid_index_raises(tmp_path: Path, edit):
    change(written(tmp_path / "s"), edit)
    message = r"s/index.json is not a valid index \(\w+: .*\); remove the directory and write it again"
    with pytest.raises(ValueError, match=message):
        open_shards(tmp_path / "s")


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda index: index["files"][1].update(tokens=99), "shard-00001.bin does not contain the tokens"),
        (lambda index: index["tokenizer"].update(size=66), "shard-00000.bin does not contain the tokens"),
        (lambda index: index.update(dtype="uint8"), "shard-00000.bin does not contain the tokens"),
        (lambda index: index["files"].pop(0), "documents.npy does not match the shards"),
        (lambda index: index["files"].pop(-1), "text_bytes.npy does not match the shards"),
        (lambda index: index["files"].pop(-2), "documents.npy does not match the shards"),
    ],
)
def test_an_index_that_does_not_match_its_files_raises(tmp_path: Path, edit, name: str):
    change(written(tmp_path / "s"), edit)
    with pytest.raises(ValueError, match=name):
        open_shards(tmp_path / "s")


@pytest.mark.parametrize("corrections", [[(-1, 2)], [(10**6, 2)], [(5, 2), (4, 2)], [(4, 2), (4, 2)], [(4, -1)]])
def test_invalid_counts_of_bytes_raise(tmp_path: Path, corrections):
    directory = written(tmp_path / "s")
    content = as_npy(np.array(corrections, TABLE))
    (directory / "text_bytes.npy").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(directory, lambda index: index["files"][-1].update(entry))
    with pytest.raises(ValueError, match=r"text_bytes.npy does not match the shards; remove the directory and"):
        open_shards(directory)


def test_a_missing_or_truncated_index_raises(tmp_path: Path):
    directory = written(tmp_path / "s")
    content = (directory / "index.json").read_text()
    (directory / "index.json").write_text(content[:100])
    for _ in range(2):
        assert are_shards(str(directory))
        with pytest.raises(ValueError, match=r"index.json is not a valid index"):
            open_shards(directory)
        (directory / "index.json").unlink(missing_ok=True)
    with (directory / "index.json").open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    with pytest.raises(ValueError, match=r"index.json is not a valid index .* has 1,099,511,627,776 bytes, more than"):
        open_shards(directory)


def test_other_directories_are_not_shards(tmp_path: Path):
    (tmp_path / "index.json").write_text('{"pages": 3}')
    assert not are_shards(str(tmp_path))
    assert not are_shards("stdlib")
    assert not are_shards("a" * 300)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="'X' at position 1 is not a base"):
        written(tmp_path / "s", [Document("a", b"ACGT" * 100), Document("b", b"X")], DnaTokenizer())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"cannot write to .*/file/s \((Not a directory|File exists)\); choose another --output"
    ):
        written(tmp_path / "file" / "s")


def test_another_tokenizer_raises_and_names_the_right_one(tmp_path: Path):
    directory = written(tmp_path / "s", [Document("a", b"ACGT" * 99)], DnaTokenizer())
    data = Data(path=str(directory), seq_len=16)
    with pytest.raises(
        ValueError, match=r"data.tokenizer='bytes', but .*/s has tokens of 'dna'; use --data.tokenizer dna"
    ):
        load(data, 1, 0)
    assert load(Data(path=str(directory), seq_len=16, tokenizer="dna"), 1, 0)[0].name == "dna"
