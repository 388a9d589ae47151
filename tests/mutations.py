"""Random changes of option values, JSON, Python source and bytes, for `fuzz.py`. Each returns what it changed."""

import json
import random
from collections.abc import Iterator
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, -(10**30))
FLOATS = (0.0, -0.0, 0.5, -0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
STRINGS = (
    "",
    " ",
    "nan",
    "None",
    "True",
    "a/b",
    "..",
    "-",
    "ü漢🙂",
    "a\nb",
    "a\u2028b",
    "\x00",
    "\ud800",
    "{",
    "~nobody",
)
STRINGS += ("x" * 300, "configs", "/dev/null", "../../..", "%s%n", "$HOME", "a" * 5000, "\x1b[31mred", "*", "[")
WORDS = (
    "",
    " ",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "5",
    "8",
    "16",
    "100",
    "4096",
    "0.5",
    "-0.5",
    "1e9",
    "1e400",
    "nan",
    "inf",
    "-inf",
)
WORDS += (
    "None",
    "True",
    "False",
    "true",
    "none",
    "9" * 30,
    "9" * 5000,
    "-" + "9" * 30,
    "0x10",
    "1_000",
    "\uff11\uff12",
    "1,2",
    "a b",
)
WORDS += (
    "ü漢🙂",
    "a\nb",
    "\u2028",
    "x" * 300,
    "..",
    "-",
    "--",
    "*",
    "/dev/null",
    "{}",
    "[1]",
    "'",
    "\\",
    "=",
    "~nobody",
    "\x1b[31m",
)


def scalar(rng: random.Random) -> Any:
    """Returns a value that JSON can hold, often one that no field takes."""
    kinds: tuple[Any, ...] = (
        None,
        True,
        False,
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        rng.choice(NUMBERS),
        rng.choice(FLOATS),
    )
    return rng.choice((*kinds, rng.choice(STRINGS), rng.choice(NUMBERS), rng.choice(STRINGS), rng.randrange(100)))


def misspelt(rng: random.Random, name: str) -> str:
    """Returns a name with one character missing, doubled, changed or swapped with the next."""
    at = rng.randrange(max(len(name), 1))
    letter = rng.choice("aeioxyz_.- é")
    return rng.choice(
        (
            name[:at] + name[at + 1 :],
            name[:at] + name[at : at + 1] * 2 + name[at + 1 :],
            name[:at] + letter + name[at + 1 :],
            name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :],
        )
    )


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all values inside a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def change_tree(rng: random.Random, tree: Any) -> tuple[str, Any]:
    """Returns a description and a copy of a JSON value with one value removed, replaced or nested."""
    tree = json.loads(json.dumps(tree))
    paths = list(nodes(tree))
    if not paths or rng.random() < 0.02:
        value = scalar(rng)
        return f"all is {value!r:.40}", value
    *parents, key = rng.choice(paths)
    parent = tree
    for each in parents:
        parent = parent[each]
    where, action = ".".join(map(str, (*parents, key))), rng.randrange(8)
    old = parent[key]
    if action == 0:
        del parent[key]
        return f"{where} removed", tree
    if action == 1 and isinstance(parent, dict):
        name = misspelt(rng, key)
        parent[name] = parent.pop(key)
        return f"{where} renamed to {name!r}", tree
    if action == 2 and isinstance(parent, list):
        parent.append(old)
        return f"{where} repeated", tree
    if action == 3:
        parent[key] = [old] if rng.random() < 0.5 else {"a": old}
        return f"{where} nested", tree
    if action == 4 and type(old) in (int, float):
        parent[key] = rng.choice((-old, old + 1, old * 2, old * 1e300, old * 10**12, old / 3))
    elif action == 5 and isinstance(old, str):
        parent[key] = rng.choice((misspelt(rng, old), old * 2, old.upper(), old + "\n", old.encode().hex()))
    else:
        parent[key] = scalar(rng)
    return f"{where} is {parent[key]!r:.60}", tree


def change_json(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Returns a description and the text of a JSON file with changed values or damaged text."""
    action = rng.random()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        action = 1.0
    if action < 0.7:
        said, tree = change_tree(rng, tree)
        if rng.random() < 0.3:
            more, tree = change_tree(rng, tree)
            said = f"{said}, {more}"
        return said, json.dumps(tree, indent=2).encode()
    if action < 0.75:
        depth = rng.choice((50, 5_000, 200_000))
        return f"nested {depth} times", b"[" * depth + rng.choice((b"", b"]" * depth))
    if action < 0.8:
        text = content.decode()
        keys = [line for line in text.splitlines(keepends=True) if '":' in line and line.rstrip().endswith(",")]
        if keys:
            line = rng.choice(keys)
            return f"{line.strip()!r:.40} twice", text.replace(line, line + line, 1).encode()
    if action < 0.85:
        name = rng.choice(("utf-16", "utf-8-sig", "latin-1"))
        text = ("ü" if name == "latin-1" else "") + content.decode()
        return f"as {name}", text.encode(name, "replace")
    if action < 0.88:
        digits = rng.choice((b"9" * 5000, b"1e999", b"-0", b"0x1", b"NaN", b"-Infinity"))
        at = content.find(b":") + 1
        return f"first value is {digits[:10]!r}", content[:at] + digits + content[content.find(b",", at) :]
    return change_bytes(rng, content)


def change_source(rng: random.Random, text: str) -> tuple[str, str]:
    """Returns a description and Python source with one line, word or character changed."""
    lines, action = text.splitlines(keepends=True), rng.randrange(9)
    at = rng.randrange(len(lines))
    if action == 0:
        return f"line {at + 1} removed", "".join(lines[:at] + lines[at + 1 :])
    if action == 1:
        return f"line {at + 1} twice", "".join([*lines[: at + 1], *lines[at:]])
    if action == 2:
        return f"cut at line {at + 1}", "".join(lines[:at])
    if action == 3:
        added = rng.choice(
            ("import missing\n", "1/0\n", "config = None\n", "config = 3\n", "raise OSError('x\\ny')\n", "x =\n")
        )
        added = rng.choice(
            (added, "\x00\n", "config = config.name\n", "def f(): f()\nf()\n", "assert False\n", "x" * 5000 + "\n")
        )
        return f"{added!r:.40} added", text + added
    import re

    found = list(
        re.finditer(r"-?\d[\d_.e]*|\"[^\"\n]*\"|True|False|None|\w+(?==)|\w+", text[text.find('"""', 3) + 3 :])
    )
    if not found:
        return "same", text
    start, match = text.find('"""', 3) + 3, rng.choice(found)
    if action in (4, 5):
        literals = [match for match in found if re.match(r"[-\d\"]|True|False|None", match[0])] or found
        match, value = rng.choice(literals), repr(scalar(rng)).encode("utf-8", "backslashreplace").decode()
        value = (
            value
            if rng.random() < 0.9
            else rng.choice(("float('nan')", "float('inf')", "10**5000", "b'x'", "object()", "(1,)"))
        )
    else:
        value = misspelt(rng, match[0])
    said = f"{match[0]!r:.40} became {value!r:.40}"
    return said, text[: start + match.start()] + value + text[start + match.end() :]


def change_bytes(rng: random.Random, content: bytes, head: int = 256) -> tuple[str, bytes]:
    """Returns a description and changed bytes, in half of the cases within the first `head` bytes."""
    size = len(content)
    near = min(head, size) if rng.random() < 0.5 else size
    at = rng.randrange(max(near, 1))
    length = min(rng.choice((1, 2, 4, 8, 64, 4096)), max(size - at, 1))
    action = rng.choice(
        ("flip", "flip", "truncate", "zero", "delete", "duplicate", "huge", "insert", "empty", "append", "text")
    )
    if action == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 8))):
            if size:
                changed[(at + rng.randrange(length)) % size] ^= 1 << rng.randrange(8)
        return f"bits of byte {at} to {at + length} flipped", bytes(changed)
    if action == "truncate":
        return f"truncated to {at} of {size} bytes", content[:at]
    if action == "zero":
        return f"{length} bytes at {at} zeroed", content[:at] + bytes(length) + content[at + length :]
    if action == "delete":
        return f"{length} bytes at {at} deleted", content[:at] + content[at + length :]
    if action == "duplicate":
        return f"{length} bytes at {at} duplicated", content[: at + length] + content[at:]
    if action == "huge":
        number = rng.choice((2**63 - 1, 2**64 - 1, 2**40, 2**32 - 1, 2**31))
        at -= at % rng.choice((1, 4, 8))
        return f"{number} at byte {at}", content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
    if action == "insert":
        return f"{length} random bytes inserted at {at}", content[:at] + rng.randbytes(length) + content[at:]
    if action == "empty":
        return "emptied", b""
    if action == "append":
        # A whole copy of a gzip file would be a valid second member.
        added = rng.choice((b"\x00" * 16, rng.randbytes(16), content[:-1]))
        return f"{len(added)} bytes appended", content + added
    value = rng.choice(
        (b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"\xf0\x9f\x99", b"\r", "\u2028".encode(), b"9" * 5000, b"\n\n")
    )
    return f"{value[:8]!r} inserted at {at}", content[:at] + value + content[at:]
