"""A tokenizer.json encodes the whole text, always alike, or is refused; every token knows its bytes of the source."""

import json
import logging
import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from ringattn.config import Data
from ringattn.data import load_tokenizer, make_loaders, prepare, read
from ringattn.data.dataset import find_tokenizer
from ringattn.data.file_tokenizer import FileTokenizer
from ringattn.data.text_bytes import TextBytes

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


def test_a_file_round_trips_with_fewer_tokens_than_bytes(path: str):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert ids.max() < tokenizer.size
    assert tokenizer.boundary == 1
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())
    assert tokenizer.byte_lengths[tokenizer.boundary] == 0


def test_text_that_spells_the_boundary_stays_text(path: str):
    tokenizer = load_tokenizer(path)
    text = f"a{BOUNDARY}b"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.boundary not in ids
    assert tokenizer.decode(ids) == text


def test_dropout_truncation_and_padding_are_switched_off_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = train([BOUNDARY])
    tokenizer.save(str(tmp_path / "plain.json"))
    plain = load_tokenizer(str(tmp_path / "plain.json"))
    assert not caplog.records
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "t.json"))
    with caplog.at_level(logging.WARNING):
        loaded = load_tokenizer(str(tmp_path / "t.json"))
    assert caplog.messages == [
        f"data.tokenizer='{tmp_path}/t.json': disabled its dropout of 0.5 and truncation to 4 tokens and padding, "
        "so that documents are encoded completely and deterministically"
    ]
    for _ in range(5):
        assert loaded.encode(TEXT.encode()).tolist() == plain.encode(TEXT.encode()).tolist()
    assert len(loaded.encode(b"a")) == 1


def test_common_end_of_text_tokens_are_recognized_and_listed(tmp_path: Path):
    train(["<s>", "</s>"]).save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).boundary == 1
    train(["<s>"]).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"\(<s>\); add one of <\|endoftext\|>, .*</s>"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_ids_outside_the_vocabulary_raise(path: str):
    tokenizer = FileTokenizer(path)
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
    os.mkfifo(tmp_path / "pipe.json")
    for special in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match=rf"{special} is a pipe or a device, not a regular file"):
            load_tokenizer(str(special))
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    with pytest.raises(ValueError, match=r"t.json has 1,099,511,627,776 bytes, more than .*: it is damaged"):
        load_tokenizer(str(tmp_path / "t.json"))
    other_line = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a\\n", "a"]]}}'
    for content in (b"{", b"\xff\xfe", b'{"version": "1.0"}', b"", other_line):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a valid tokenizer.json \(.*\); use") as error:
            load_tokenizer(str(tmp_path / "t.json"))
        assert "\n" not in str(error.value)
    far = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 2147483648}, "merges": []}}'
    (tmp_path / "t.json").write_bytes(far)
    with pytest.raises(ValueError, match=r"has the token id 2,147,483,648, and 1 tokens; ids must be below"):
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


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def saved(tmp_path: Path, model: models.Model, pre_tokenizer, normalizer=None, special=("</s>",)) -> str:
    """Returns the path of a tokenizer.json with these parts."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer or normalizers.Sequence([])
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(tmp_path / "t.json"))
    return str(tmp_path / "t.json")


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def test_text_without_a_token_is_refused_by_character(tmp_path: Path):
    """The package drops it silently: this vocabulary has neither byte fallback nor an unknown token."""
    model = models.BPE(numbered("</s>", *ALPHABET), [])
    tokenizer = load_tokenizer(saved(tmp_path, model, pre_tokenizers.Whitespace()))
    assert tokenizer.decode(tokenizer.encode(b"all of it\n")) == "a l l o f i t"
    message = r"t.json' drops 'é' \(character 5\), because it has no token; use a tokenizer with byte fallback or"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode("all é of it".encode())
    (tmp_path / "a.txt").write_text("caf\u00e9 " * 20)
    with pytest.raises(ValueError, match=r"a.txt: data.tokenizer='.*' drops 'é' \(character 4\)"):
        read(Data(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "t.json")))


def test_bytes_without_a_token_are_refused(tmp_path: Path):
    """Trained without initial_alphabet: of the two bytes of é, only the first has a token."""
    tokenizer = train([BOUNDARY])
    first, second = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0]
    parts = json.loads(tokenizer.to_str())
    del parts["model"]["vocab"][second]
    parts["model"]["merges"] = []
    (tmp_path / "t.json").write_text(json.dumps(parts))
    loaded = load_tokenizer(str(tmp_path / "t.json"))
    assert first in parts["model"]["vocab"]
    assert loaded.encode("a 漢\u3000".encode()).size == 8
    with pytest.raises(ValueError, match=r"drops 'é' \(character 3\)"):
        loaded.encode("漢 é".encode())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            models.WordLevel(numbered("</s>", "a"), unk_token="<unk>"),
            "names the unknown token '<unk>', which its vocab",
        ),
        (
            models.WordPiece(numbered("</s>", "a"), unk_token="[UNK]"),
            "names the unknown token '[UNK]', which its vocab",
        ),
        (models.BPE(numbered("</s>", "a"), [], unk_token="<unk>"), "names the unknown token '<unk>', which its vocab"),
        (models.Unigram([("</s>", 0.0), ("a", -1.0)], None), "names no unknown token, so that text outside the"),
    ],
    ids=["WordLevel", "WordPiece", "BPE", "Unigram"],
)
def test_a_missing_unknown_token_is_refused(tmp_path: Path, model: models.Model, message: str):
    with pytest.raises(ValueError, match=rf"t.json' {re.escape(message)}.*; add it, or use data.tokenizer=bytes"):
        load_tokenizer(saved(tmp_path, model, pre_tokenizers.Whitespace()))


def test_a_missing_unknown_token_that_is_never_needed_is_accepted(path: str):
    parts = json.loads(Path(path).read_text())
    for name in ("", "<unk>"):
        parts["model"]["unk_token"] = name
        Path(path).write_text(json.dumps(parts))
        assert load_tokenizer(path).decode(load_tokenizer(path).encode(TEXT.encode())) == TEXT


def test_text_that_becomes_the_boundary_is_refused(tmp_path: Path):
    """The pieces of a Unigram model include its special tokens."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in ALPHABET + "</>")]
    tokenizer = load_tokenizer(saved(tmp_path, models.Unigram(pieces, 0), pre_tokenizers.WhitespaceSplit()))
    assert tokenizer.encode(b"a </b>").size == 5
    with pytest.raises(
        ValueError, match=r"turns a part of the text into its end-of-text token '</s>'; remove that part"
    ):
        tokenizer.encode(b"a</s>")


def test_what_a_normalizer_removes_is_refused_unless_it_is_a_control_character_or_an_accent(tmp_path: Path):
    model, whitespace = (
        models.WordLevel(numbered("</s>", "<unk>", "e", "a"), unk_token="<unk>"),
        pre_tokenizers.Whitespace(),
    )
    bert = load_tokenizer(saved(tmp_path, model, whitespace, normalizers.BertNormalizer()))
    assert bert.encode("E\u0301 \x07a".encode()).tolist() == [2, 3]
    letters = normalizers.Replace(tokenizers.Regex("[^a-z ]"), "")
    with pytest.raises(ValueError, match=r"drops 'E' \(character 3\)"):
        load_tokenizer(saved(tmp_path, model, whitespace, letters)).encode(b"a E")


def byte_level(tmp_path: Path, normalizer=None, prefix: bool = False, suffix: str = "", unknown: str = "") -> str:
    """Like GPT-2; with a suffix at the end of words like CLIP."""
    affix: dict[str, Any] = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = tokenizers.Tokenizer(models.BPE(**affix, **({"unk_token": unknown} if unknown else {})))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not suffix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), level] if suffix else [level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = [] if unknown else [letter + end for letter in level.alphabet() for end in {"", suffix}]
    special = [BOUNDARY, unknown] if unknown else [BOUNDARY, *alphabet]
    trainer = BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False, **affix)
    tokenizer.train_from_iterator([TEXT], trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = parts["added_tokens"][: 2 if unknown else 1]  # the alphabet is not special
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parts))
    tokenizer.add_tokens([tokenizers.AddedToken("return", lstrip=True, normalized=False)])
    tokenizer.save(str(tmp_path / "t.json"))
    return str(tmp_path / "t.json")


def test_a_byte_that_has_a_token_only_within_words_is_refused_at_their_end(tmp_path: Path):
    path = Path(byte_level(tmp_path, suffix="</w>"))
    parts = json.loads(path.read_text())
    letter = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0][1]
    parts["model"]["merges"] = []
    del parts["model"]["vocab"][f"{letter}</w>"]
    path.write_text(json.dumps(parts))
    assert load_tokenizer(str(path)).encode("éa".encode()).size == 3
    with pytest.raises(ValueError, match=r"drops 'é' \(character 4\)"):
        load_tokenizer(str(path)).encode("éa é".encode())


def byte_fallback(tmp_path: Path) -> str:
    """Like Llama 2: a space is prepended, and spaces become U+2581."""
    vocabulary = numbered("<unk>", "</s>", "\u2581", *ALPHABET, *(f"<0x{byte:02X}>" for byte in range(256)))
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return saved(tmp_path, model, pre_tokenizers.Sequence([]), normalizer, ("</s>", "<unk>"))


def unigram(tmp_path: Path) -> str:
    """Like T5: unknown text becomes one token."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in ALPHABET)]
    special = ("</s>", "<unk>")
    return saved(tmp_path, models.Unigram(pieces, 0), pre_tokenizers.Metaspace(), normalizers.NFKC(), special)


def word_piece(tmp_path: Path) -> str:
    """Like BERT: lower case, no accents, no white space."""
    model = models.WordPiece(numbered("[UNK]", "[SEP]", "de", "##f", "x", "return", "(", ")", ":"), unk_token="[UNK]")
    parts = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return saved(tmp_path, model, *parts, ("[SEP]", "[UNK]"))


TOKENIZERS = {
    "plain": byte_level,
    "prefix": partial(byte_level, prefix=True),
    "NFC": partial(byte_level, normalizer=normalizers.NFC()),
    "NFKC": partial(byte_level, normalizer=normalizers.NFKC(), prefix=True),
    "lower": partial(byte_level, normalizer=normalizers.Lowercase()),
    "suffix": partial(byte_level, normalizer=normalizers.Lowercase(), suffix="</w>"),
    "unknown": partial(byte_level, unknown="<unk>"),
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "word_piece": word_piece,
}
SOURCES = (
    "  def F(x):\n\n\treturn 'É e\u0301 漢 🙂'  ",
    "İ ﬁ ｱ \u1112\u1161\u11ab x\u200b \x07end   return\n",
    "x",
    " \n",
    "def <unk> [UNK] return",
)


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokens_stand_for_all_bytes_of_the_source(tmp_path: Path, make):
    tokenizer = load_tokenizer(make(tmp_path))
    for source in SOURCES:
        ids, corrections = tokenizer.align(source.encode())
        counts = TextBytes(tokenizer.byte_lengths, corrections).of(np.arange(ids.size), ids)
        assert counts.sum() == (len(source.encode()) if ids.size else 0)
        assert counts.min(initial=0) >= 0
        assert ids.tolist() == tokenizer.encode(source.encode()).tolist()


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_validation_counts_the_bytes_of_the_source(tmp_path: Path, make):
    """Also from shards, and for rows that contain a part of a document."""
    lines = [source + str(number % 3) for number, source in enumerate(SOURCES * 6)] + [TEXT]
    lines = list(dict.fromkeys(f"x{number} {line}" for number, line in enumerate(lines)))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    data = Data(path=str(tmp_path / "text.jsonl"), tokenizer=make(tmp_path), seq_len=1, validation=0.3)
    prepare(data, str(tmp_path / "shards"))
    for path in (data.path, str(tmp_path / "shards")):
        splits = read(replace(data, path=path))
        loaders = make_loaders(splits, data, 1, 0)
        total = sum(int(loader.text_bytes(step).sum()) for loader in loaders for step in range(loader.rows_per_epoch))
        assert total == sum(len(line.encode()) for line in lines)


def test_bytes_of_a_row_are_those_of_its_tokens(tmp_path: Path):
    """Also of an accent that the normalizer composes with its letter."""
    tokenizer = load_tokenizer(word_piece(tmp_path))
    ids, corrections = tokenizer.align("De\u0301f  RETURN\n漢xyz x".encode())
    counts = TextBytes(tokenizer.byte_lengths, corrections).of(np.arange(ids.size), ids)
    assert ids.tolist() == [2, 3, 5, 0, 0, 4]
    assert counts.tolist() == [
        len("De\u0301".encode()),
        1,
        len("  RETURN"),
        len("\n漢".encode()),
        len("xyz"),
        len(" x"),
    ]
