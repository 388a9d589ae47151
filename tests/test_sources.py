import logging
import os
from pathlib import Path

import pytest

from ringattn.data.sources import read_documents


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Returns a directory with text at two depths, a hidden file and directory, a binary file and an empty file."""
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


def test_the_standard_library_has_no_tests_and_one_copy_of_the_topics():
    documents = list(read_documents("stdlib"))
    names = [document.name for document in documents]
    assert {"stdlib/asyncio/events.py", "stdlib/ast.py", "stdlib/topics/if"} <= set(names)
    assert len(set(names)) == len(names)
    directories = {part for name in names for part in name.split("/")[:-1]}
    assert not directories & {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    assert 5e6 < sum(len(document.content) for document in documents) < 15e6
    assert names == [document.name for document in read_documents("stdlib")]


def test_a_directory_is_read_in_order_without_hidden_binary_and_empty_files(
    directory: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        documents = list(read_documents(str(directory)))
    assert [document.content for document in documents] == [b"sea", b"first", b"second", b"bee"]
    assert documents[2].name == f"{directory}/a/one.jsonl:3"
    assert [record.getMessage() for record in caplog.records] == [
        f"data.path={str(directory)!r}: skipped 1 of 5 files that are not plain text"
    ]


def test_the_order_is_by_name_not_by_creation(tmp_path: Path):
    for i in range(20):
        (tmp_path / f"{i * 7 % 20:02}").write_text(f"{i * 7 % 20:02}")
    in_order = [f"{i:02}".encode() for i in range(20)]
    assert contents(tmp_path) == contents(tmp_path / "*") == in_order


def test_a_linked_directory_is_counted_and_not_entered(directory: Path, caplog: pytest.LogCaptureFixture):
    (directory / "a" / "back").symlink_to(directory)
    assert len(contents(directory)) == 4
    assert "skipped 2 of 6" in caplog.text


def test_a_file_and_globs(directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert contents(directory / "b.txt") == [b"bee"]
    assert contents(directory / "*.txt") == [b"bee"]
    assert contents(directory / "**/*.[pt]*") == [b"sea", b"bee"]
    assert "skipped 1 of 4" in caplog.text
    caplog.clear()
    assert contents(directory / "**") == contents(directory)
    assert caplog.text.count("skipped 1 of 5") == 2  # directories that match are not skipped files
    monkeypatch.setenv("HOME", str(directory))
    assert contents("~/b.txt") == [b"bee"]
    (directory / "[x].txt").write_bytes(b"a name, not a pattern")
    assert contents(directory / "[x].txt") == [b"a name, not a pattern"]


def test_jsonl_decodes_escapes_exactly(tmp_path: Path):
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
def test_an_invalid_line_is_named(tmp_path: Path, line: bytes):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r't\.jsonl:2: .*; each line must be a JSON object with a string under "text"'):
        contents(tmp_path)


def test_missing_and_empty_paths_raise(tmp_path: Path):
    for path in (f"{tmp_path}/none", "", f"{tmp_path}/none\0"):
        with pytest.raises(ValueError, match=r"is neither a file nor a directory; use .* or 'stdlib'"):
            contents(path)
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"matches no file; add text files"):
            contents(path)
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ValueError, match=r"has no text; use a non-empty file"):
            contents(path)


def test_a_binary_file_raises_if_it_is_the_path_or_the_only_file(tmp_path: Path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match="contains NUL bytes, so it is not plain text"):
        contents(str(tmp_path / "image.png"))
    with pytest.raises(ValueError, match="has no text"):
        contents(tmp_path)


@pytest.mark.parametrize("video", [False, True])
def test_a_document_larger_than_the_memory_is_not_read(tmp_path: Path, video: bool):
    with (tmp_path / "a.mp4").open("wb") as file:
        file.truncate(2**43)  # takes no space on the disk
    with pytest.raises(
        ValueError, match=r"a.mp4 is one document of 8 TiB, but this machine has .* of memory; split it"
    ):
        list(read_documents(str(tmp_path / "a.mp4"), video))


def test_unreadable_paths_raise(directory: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"data.path='aaa"):
        contents("a" * 300)

    def refuse(path: str | Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # Patched, because root can read every file.
    monkeypatch.setattr(Path, "open", refuse)
    for path in (directory, directory / "b.txt"):
        with pytest.raises(ValueError, match=r"cannot read '.*' \(Permission denied\); check its permissions"):
            contents(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot read '.*' \(Permission denied\)"):
        contents(directory)
