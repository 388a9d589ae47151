"""Shards give the tokens they were written from, or say which file is not as it was."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ringattn.config import Data
from ringattn.data.corpus import encode, gather
from ringattn.data.dna import DnaTokenizer
from ringattn.data.formats import Document
from ringattn.data.loader import load
from ringattn.data.shards import are_shards, open_shards, write_shards
from ringattn.data.sources import read_documents
from ringattn.data.tokenizer import ByteTokenizer

DOCUMENTS = [Document(f"d{i}", bytes([65 + i]) * (i * 37 % 50 + 1), prompt=i % 3) for i in range(20)]


def written(folder: Path, documents=DOCUMENTS, tokenizer=None, shard_tokens: int = 100) -> Path:
    tokenizer = tokenizer or ByteTokenizer()
    told = []
    write_shards(
        folder,
        encode(documents, tokenizer),
        tokenizer,
        Data(),
        lambda *more: told.append(more),
        shard_tokens=shard_tokens,
    )
    assert len(told) == len(documents)
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 10**6])
def test_what_is_read_is_what_was_written(tmp_path: Path, shard_tokens: int):
    shards = open_shards(written(tmp_path / "s", shard_tokens=shard_tokens))
    corpus, digests, _ = gather(encode(DOCUMENTS, ByteTokenizer()), ByteTokenizer())
    found = shards.corpus(ByteTokenizer())
    places = np.arange(corpus.count + 1)
    assert np.array_equal(found.tokens[places], corpus.tokens[places])
    for name in ("starts", "lengths", "contexts"):
        assert np.array_equal(getattr(found, name), getattr(corpus, name))
    assert shards.digests() == digests
    count = len(list((tmp_path / "s").glob("shard-*.bin")))
    assert count == -(-corpus.count // shard_tokens)  # the last boundary never makes one of its own
    assert are_shards(str(tmp_path / "s"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_tokens_are_mapped_and_not_read(tmp_path: Path):
    shards = open_shards(written(tmp_path / "s"))
    assert all(isinstance(array, np.memmap) for array in shards.tokens._arrays)


def test_training_from_shards_is_training_from_the_source(tmp_path: Path):
    lines = [json.dumps({"prompt": "p" * (i % 4), "completion": f"answer {i} " * 9}) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = Data(path=str(tmp_path / "t.jsonl"), seq_len=16, validation=0.2, overlap=3)
    (tmp_path / "genome.fa").write_bytes(b">a\n" + b"ACGTNNGT" * 100)
    genome = Data(path=str(tmp_path / "genome.fa"), seq_len=16, validation=0.2, tokenizer="dna")
    for data, tokenizer in ((source, ByteTokenizer()), (genome, DnaTokenizer())):
        folder = tmp_path / tokenizer.name
        write_shards(folder, encode(read_documents(str(data.path)), tokenizer), tokenizer, data, lambda *_: None, 99)
        of_shards = Data(**{**vars(data), "path": str(folder)})
        for mine, other in zip(load(data, 2, 5)[1:], load(of_shards, 2, 5)[1:], strict=True):
            assert mine.rows_per_epoch == other.rows_per_epoch
            for step in range(mine.rows_per_epoch):
                for x, y in zip(mine.batch(step), other.batch(step), strict=True):
                    assert np.array_equal(x, y)


def spoil(path: Path, at: int = 5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00003.bin", "documents.npy"])
def test_a_file_that_is_not_as_it_was_is_refused_with_its_name(tmp_path: Path, name: str):
    whole = written(tmp_path / "whole")
    for number, (harm, message) in enumerate(
        [
            (lambda path: spoil(path, path.stat().st_size // 2), "was changed since it was written"),
            (lambda path: os.truncate(path, path.stat().st_size - 1), r"has \d+ bytes instead of \d+"),
            (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"has \d+ bytes instead of \d+"),
            (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
        ]
    ):
        folder = shutil.copytree(whole, tmp_path / str(number))
        harm(folder / name)
        assert are_shards(str(folder))
        with pytest.raises(
            ValueError,
            match=rf"/{number}/{name} {message}: .*remove the folder and write it anew by scripts/prepare.py",
        ):
            open_shards(folder)


def change(folder: Path, edit) -> None:
    index = json.loads((folder / "index.json").read_text())
    edit(index)
    (folder / "index.json").write_text(json.dumps(index))


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
def test_an_index_that_says_what_it_must_not_is_refused(tmp_path: Path, edit):
    change(written(tmp_path / "s"), edit)
    with pytest.raises(
        ValueError, match=r"s/index.json is no index of shards \(\w+: .*\): remove the folder and write it anew"
    ):
        open_shards(tmp_path / "s")


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda index: index["files"][1].update(tokens=99), "shard-00001.bin holds other tokens"),
        (lambda index: index["tokenizer"].update(size=66), "shard-00000.bin holds other tokens"),
        (lambda index: index.update(dtype="uint8"), "shard-00000.bin holds other tokens"),
        (lambda index: index["files"].pop(0), "documents.npy does not go with the shards"),
        (lambda index: index["files"].pop(-1), "documents.npy does not go with the shards"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, edit, name: str):
    change(written(tmp_path / "s"), edit)
    with pytest.raises(ValueError, match=name):
        open_shards(tmp_path / "s")


def test_a_folder_without_an_index_or_with_half_of_one_is_refused(tmp_path: Path):
    folder = written(tmp_path / "s")
    content = (folder / "index.json").read_text()
    (folder / "index.json").write_text(content[:100])
    for _ in range(2):
        assert are_shards(str(folder))
        with pytest.raises(ValueError, match=r"index.json is no index of shards"):
            open_shards(folder)
        (folder / "index.json").unlink(missing_ok=True)


def test_other_folders_are_no_shards(tmp_path: Path):
    (tmp_path / "index.json").write_text('{"pages": 3}')
    assert not are_shards(str(tmp_path))
    assert not are_shards("stdlib")
    assert not are_shards("a" * 300)


def test_writing_that_is_cut_off_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="'X' at place 1 is no base"):
        written(tmp_path / "s", [Document("a", b"ACGT" * 100), Document("b", b"X")], DnaTokenizer())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"cannot write to .*/file/s \((Not a directory|File exists)\): choose another --output"
    ):
        written(tmp_path / "file" / "s")


def test_another_tokenizer_is_refused_with_the_one_that_serves(tmp_path: Path):
    folder = written(tmp_path / "s", [Document("a", b"ACGT" * 99)], DnaTokenizer())
    data = Data(path=str(folder), seq_len=16)
    with pytest.raises(
        ValueError, match=r"data.tokenizer='bytes', but .*/s holds tokens of 'dna': use --data.tokenizer dna"
    ):
        load(data, 1, 0)
    assert load(Data(path=str(folder), seq_len=16, tokenizer="dna"), 1, 0)[0].name == "dna"
