import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from ringattn.config import Data
from ringattn.data import load_tokenizer
from ringattn.data.dataset import find_tokenizer
from ringattn.data.tokenizer import ByteTokenizer, FileTokenizer

TEXT = "def f(x):\n    return 'é 漢 🙂'\n" * 3
BOUNDARY = "<|endoftext|>"


def train(special: list[str]) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer like that of GPT-2."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture
def path(tmp_path: Path) -> str:
    name = str(tmp_path / "tokenizer.json")
    train(["<pad>", BOUNDARY]).save(name)
    return name


def test_bytes_round_trip_and_never_yield_the_boundary():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.size, tokenizer.boundary) == (257, 256)
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))
    assert tokenizer.encode(b"").tolist() == []


def test_bytes_decode_any_shape_without_boundaries_and_with_bad_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(np.array([[256, 97], [98, 256]])) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.byte_length(np.array([[256, 97], [0xC3, 256]], np.int32)) == 2


def test_a_file_round_trips_with_fewer_tokens_than_bytes(path: str):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert ids.max() < tokenizer.size
    assert tokenizer.boundary == 1
    assert tokenizer.byte_length([1, *ids, 1]) == len(TEXT.encode())


def test_text_that_spells_the_boundary_stays_text(path: str):
    tokenizer = load_tokenizer(path)
    text = f"a{BOUNDARY}b"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.boundary not in ids
    assert tokenizer.decode(ids) == text


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path):
    tokenizer = train([BOUNDARY])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(str(tmp_path / "t.json"))
    assert loaded.decode(loaded.encode(TEXT.encode())) == TEXT
    assert len(loaded.encode(b"a")) == 1


def test_common_end_of_text_tokens_are_recognized_and_listed(tmp_path: Path):
    train(["<s>", "</s>"]).save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).boundary == 1
    train(["<s>"]).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"\(<s>\); add one of <\|endoftext\|>, .*</s>"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_ids_outside_the_vocabulary_raise(path: str):
    for tokenizer in (ByteTokenizer(), FileTokenizer(path)):
        for bad in (-1, tokenizer.size):
            with pytest.raises(
                ValueError, match=rf"token id {bad} must be from 0 to \d+, for a vocabulary of {tokenizer.size}"
            ):
                tokenizer.decode([0, bad])


def test_invalid_files_raise(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.tokenizer='byte' cannot be read \(No such file.*or 'bytes'"):
        load_tokenizer("byte")
    with pytest.raises(ValueError, match="directory"):
        load_tokenizer(str(tmp_path))
    for content in (b"{", b"\xff\xfe", b'{"version": "1.0"}', b""):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a valid tokenizer.json"):
            load_tokenizer(str(tmp_path / "t.json"))


def test_a_missing_package_is_named(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'ringattn\[tokenizers\]'"):
        load_tokenizer(path)


def test_a_run_reads_the_copy_in_its_run_directory(path: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    Path(path).rename(tmp_path / "run" / "tokenizer.json")
    data = Data(tokenizer=path)
    copy, direct = (
        find_tokenizer(data, run_directory=tmp_path / "run"),
        load_tokenizer(f"{tmp_path}/run/tokenizer.json"),
    )
    assert copy.encode(TEXT.encode()).tolist() == direct.encode(TEXT.encode()).tolist()
    assert find_tokenizer(Data(), run_directory=tmp_path / "run").name == "bytes"
    with pytest.raises(ValueError, match="cannot be read"):
        find_tokenizer(data)
