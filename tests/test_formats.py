"""Files with many documents: JSONL, Parquet, FASTA."""

import gzip
import importlib
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ringattn.data.formats import Document, read_fasta, read_jsonl, read_parquet, reader_for
from ringattn.data.sources import read_documents


def fields(documents) -> list[tuple[bytes, int]]:
    return [(document.content, document.prompt) for document in documents]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.jsonl", read_jsonl),
        ("a.PARQUET", read_parquet),
        ("a.fa", read_fasta),
        ("a.b.fasta", read_fasta),
        ("a.FNA.gz", read_fasta),
        ("a.ffn.gz", read_fasta),
        ("a.txt", None),
        ("a.txt.gz", None),
        ("fa", None),
        ("gz", None),
        (".gz", None),
    ],
)
def test_the_name_selects_the_reader(name, read):
    assert reader_for(Path(name)) is read


def test_a_prompt_and_its_completion_are_one_document(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "Ünd? ", "completion": "yes", "id": 3}\n{"text": "plain"}\n')
    assert fields(read_jsonl(tmp_path / "t.jsonl")) == [("Ünd? yes".encode(), 6), (b"plain", 0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', '"completion" is missing'),
        ('{"completion": "a"}', '"prompt" is missing'),
        ('{"prompt": "a", "completion": 1}', '"completion" is 1, not a string'),
        ('{"text": "a", "prompt": "b"}', '"text" and "prompt" cannot be combined'),
        ('{"text": "a", "completion": "b"}', '"text" and "completion" cannot be combined'),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match=rf't\.jsonl:2: {message}; .*strings under "prompt" and "completion"'):
        list(read_jsonl(tmp_path / "t.jsonl"))


def table(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


def test_parquet_gives_a_document_per_row(tmp_path: Path):
    texts = [f"text {number}" for number in range(700)]
    documents = list(read_parquet(table(tmp_path / "t.parquet", id=range(700), text=texts)))
    assert [document.content.decode() for document in documents] == texts
    assert documents[300].name == f"{tmp_path}/t.parquet:300"
    pairs = table(tmp_path / "p.parquet", completion=["c", "dd"], prompt=["a", "bbb"])
    assert fields(read_parquet(pairs)) == [(b"ac", 1), (b"bbbdd", 3)]
    assert len(list(read_documents(str(tmp_path)))) == 702


def test_an_invalid_parquet_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r'p.parquet has the columns words, prompt; .* a string under "text"'):
        list(read_parquet(table(tmp_path / "p.parquet", words=["a"], prompt=["b"])))
    with pytest.raises(ValueError, match=r'p.parquet:1: "text" is None, not a string; each row must'):
        list(read_parquet(table(tmp_path / "p.parquet", text=["a", None])))
    whole = table(tmp_path / "p.parquet", text=["some text"] * 1000).read_bytes()
    page = whole[:4] + b"\r" + whole[5:]
    (tmp_path / "p.parquet").write_bytes(page)
    with pytest.raises(ValueError, match=r"p.parquet cannot be read \(.*\); check its permissions") as refusal:
        list(read_parquet(tmp_path / "p.parquet"))
    assert "\n" not in str(refusal.value)
    for damaged in (whole[:-100], b"PAR1" + bytes(50), b""):
        (tmp_path / "p.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"p.parquet is not a readable Parquet file \(.*\); write it again"):
            list(read_parquet(tmp_path / "p.parquet"))


def test_parquet_without_pyarrow_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"pip install 'ringattn\[parquet\]'"):
        list(read_parquet(tmp_path / "t.parquet"))


FASTA = b"\n>one first record\nACGT\nacgn\r\n\n>two\nTT\n"


@pytest.mark.parametrize("name", ["g.fa", "g.fasta.gz"])
def test_fasta_gives_a_document_per_record(tmp_path: Path, name: str):
    content = gzip.compress(FASTA) if name.endswith(".gz") else FASTA
    (tmp_path / name).write_bytes(content)
    documents = list(read_documents(str(tmp_path / name)))
    assert [(document.name, document.content) for document in documents] == [
        (f"{tmp_path}/{name}: record one", b"ACGTACGN"),
        (f"{tmp_path}/{name}: record two", b"TT"),
    ]
    assert sum(document.bytes_read for document in documents) == len(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ACGT\n>one\nACGT\n", "line 1 precedes the first header, so the file is not FASTA"),
        (b"", "has no record"),
        (b">one\n>two\nAC\n", "record one has no sequence"),
        (b">one\nAC\n>\n \n", "record at line 3 has no sequence"),
    ],
)
def test_invalid_fasta_raises(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "g.fa").write_bytes(content)
    with pytest.raises(ValueError, match=rf"g\.fa.*{message}"):
        list(read_fasta(tmp_path / "g.fa"))


@pytest.mark.parametrize("read", [read_jsonl, read_fasta])
def test_the_length_of_a_line_is_bounded(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ringattn.data.formats.MAX_LINE", 40)
    for name, opener in (("a.fa", open), ("a.fa.gz", gzip.open)):
        path = tmp_path / name
        with opener(path, "wb") as file:
            file.write(b'{"text": "a"}\n' if read is read_jsonl else b">a\nACGT\n")
        assert len(list(read(path))) == 1
        with opener(path, "wb") as file:
            file.write(bytes(100))
        with pytest.raises(ValueError, match=r"a\.fa.* has a line of more than 40 bytes; break its lines"):
            list(read(path))


def test_damaged_gzip_raises(tmp_path: Path):
    whole = gzip.compress(b">one\n" + bytes(b"ACGT"[i * i * 7 % 11 % 4] for i in range(50_000)))
    path = tmp_path / "g.fa.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"g.fa.gz has truncated gzip data; copy or download it again"):
        list(read_documents(str(path)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (bytes(flipped), b"ACGT" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"g.fa.gz has corrupt gzip data \(.*\); copy or download it again"):
            list(read_documents(str(path)))


def bgzip(*parts: bytes) -> bytes:
    """Returns a bgzip file: one member per part, each with the subfield BC, and an empty last member."""
    members = []
    for part in (*parts, b""):
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(part) + packer.flush()
        size = (len(packed) + 25).to_bytes(2, "little")
        head = bytes.fromhex("1f8b08040000000000ff0600424302 00") + size
        members.append(head + packed + zlib.crc32(part).to_bytes(4, "little") + len(part).to_bytes(4, "little"))
    return b"".join(members)


def test_a_bgzip_file_truncated_between_two_members_raises(tmp_path: Path):
    path, whole = tmp_path / "g.fa.gz", bgzip(b">one\nACGT\n", b"ACGT\n")
    path.write_bytes(whole)
    assert [document.content for document in read_fasta(path)] == [b"ACGTACGT"]
    path.write_bytes(whole[:-28])
    assert gzip.decompress(path.read_bytes()) == b">one\nACGT\nACGT\n"  # the gzip module accepts it
    with pytest.raises(ValueError, match=r"g.fa.gz has truncated gzip data; copy"):
        list(read_fasta(path))


@pytest.mark.parametrize("name", ["t.ndjson", "t.jsonl.gz"])
def test_jsonl_with_another_suffix_or_compressed(tmp_path: Path, name: str):
    lines = b'{"text": "one"}\n\n{"prompt": "t", "completion": "wo"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert fields(read_documents(str(tmp_path))) == [(b"one", 0), (b"two", 1)]
    (tmp_path / name).write_bytes(gzip.compress(lines)[:-9] if name.endswith("gz") else lines[:-3])
    with pytest.raises(ValueError, match=name):
        list(read_documents(str(tmp_path)))


def test_the_digest_depends_only_on_the_content():
    assert Document("a", b"x").digest == Document("b", b"x").digest != Document("a", b"y").digest
    assert len(Document("a", b"x").digest) == 32


def test_the_kind_is_the_suffix_or_the_name_of_a_file_of_many_documents(tmp_path: Path):
    (tmp_path / "many.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "g.fa").write_bytes(b">a b\nAC\n")
    table(tmp_path / "rows.parquet", text=["a"])
    (tmp_path / "code.py").write_text("pass")
    (tmp_path / "notes").write_text("text")
    kinds = sorted(document.kind for document in read_documents(str(tmp_path)))
    assert kinds == sorted(["many.jsonl", "g.fa", "rows.parquet", ".py", tmp_path.name])
