import logging
import os
from pathlib import Path

import pytest

from ringattn.data.sources import read_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text at two depths, beside a hidden file, a hidden folder, a binary and an empty file."""
    for name, content in {
        "b.txt": b"bee",
        "a/deep/c.py": b"sea",
        "a/one.jsonl": b'{"text": "first"}\n\n{"text": "second", "more": 1}',
        ".hidden": b"no",
        ".git/config": b"no",
        "image.png": b"\x89PNG" + b"x" * 9000 + b"\0",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def contents(path: Path | str) -> list[bytes]:
    return [document.content for document in read_documents(str(path))]


def test_standard_library_is_large_and_without_tests_or_a_second_copy_of_the_topics():
    documents = list(read_documents("stdlib"))
    names = [document.name for document in documents]
    assert {"stdlib/asyncio/events.py", "stdlib/ast.py", "stdlib/topics/if"} <= set(names)
    assert len(set(names)) == len(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    assert 5e6 < sum(len(document.content) for document in documents) < 15e6
    assert names == [document.name for document in read_documents("stdlib")]


def test_folder_is_read_in_order_without_hidden_binary_and_empty_files(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        documents = list(read_documents(str(folder)))
    assert [document.content for document in documents] == [b"sea", b"first", b"second", b"bee"]
    assert documents[2].name == f"{folder}/a/one.jsonl:3"
    assert [record.getMessage() for record in caplog.records] == [
        f"data.path={str(folder)!r}: skipped 1 of 5 files that are not plain text"
    ]


def test_order_is_by_name_not_by_creation(tmp_path: Path):
    for i in range(20):
        (tmp_path / f"{i * 7 % 20:02}").write_text(f"{i * 7 % 20:02}")
    in_order = [f"{i:02}".encode() for i in range(20)]
    assert contents(tmp_path) == contents(tmp_path / "*") == in_order


def test_linked_folder_is_counted_and_not_entered(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "a" / "back").symlink_to(folder)
    assert len(contents(folder)) == 4
    assert "skipped 2 of 6" in caplog.text


def test_file_and_globs(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert contents(folder / "b.txt") == [b"bee"]
    assert contents(folder / "*.txt") == [b"bee"]
    assert contents(folder / "**/*.[pt]*") == [b"sea", b"bee"]
    assert "skipped 1 of 4" in caplog.text
    caplog.clear()
    assert contents(folder / "**") == contents(folder)
    assert caplog.text.count("skipped 1 of 5") == 2  # folders that match are not files left out
    monkeypatch.setenv("HOME", str(folder))
    assert contents("~/b.txt") == [b"bee"]
    (folder / "[x].txt").write_bytes(b"a name, not a pattern")
    assert contents(folder / "[x].txt") == [b"a name, not a pattern"]


def test_jsonl_keeps_what_json_says(tmp_path: Path):
    (tmp_path / "t.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "a\\n\\u00e9\\u0000"}\r\n{"text": ""}\r\n')
    assert contents(tmp_path / "t.JSONL") == ["a\né\0".encode()]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"txt": "a"}',
        b'{"text": 1}',
        b'{"text": null}',
        b'["a"]',
        b"3",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r't\.jsonl:2: \w+Error: .*a JSON object with a string under "text"'):
        contents(tmp_path)


def test_missing_and_empty_paths_are_refused(tmp_path: Path):
    for path in (f"{tmp_path}/none", "", f"{tmp_path}/none\0"):
        with pytest.raises(ValueError, match=r"is neither a file nor a folder: name .* or 'stdlib'"):
            contents(path)
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"finds no file: put text files there"):
            contents(path)
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ValueError, match=r"holds no text: name a non-empty file"):
            contents(path)


def test_binary_file_is_refused_where_named_and_where_alone(tmp_path: Path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match="holds NUL bytes, so it is not plain text"):
        contents(str(tmp_path / "image.png"))
    with pytest.raises(ValueError, match="holds no text"):
        contents(tmp_path)


def test_unreadable_paths_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"data.path='aaa"):
        contents("a" * 300)

    def refuse(path: str | Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # By patching, since the superuser may read everything.
    monkeypatch.setattr(Path, "open", refuse)
    for path in (folder, folder / "b.txt"):
        with pytest.raises(ValueError, match=r"cannot read '.*' \(Permission denied\): check its permissions"):
            contents(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot read '.*' \(Permission denied\)"):
        contents(folder)
