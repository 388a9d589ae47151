"""What a section's `__post_init__` is made of: checks of types and ranges whose messages name the field and a cure."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

UNIONS = (UnionType, Union)
"""`int | None`, and `Literal[...] | None`, which Python makes of another type."""
WHOLE = ("Config", "Benchmark", "Evaluation")
"""What is no section of something else: a user writes its own fields bare."""


def prefix(section: type) -> str:
    """How a user writes the section in front of a field: 'model.'; nothing for the fields of a whole config."""
    return "" if section.__name__ in WHOLE else f"{section.__name__.lower()}."


def require(holds: bool, section: Any, name: str, rule: str) -> None:
    """Raises ValueError ('model.heads=6 must be <rule>') unless `holds`."""
    if not holds:
        raise ValueError(f"{prefix(type(section))}{name}={vars(section)[name]!r} must be {rule}")


def at_least(low: int, section: Any, *names: str) -> None:
    for name in names:
        require(vars(section)[name] >= low, section, name, f"at least {low}")


def check_types(section: Any) -> None:
    """Raises ValueError for a value that is not of its field's type; an int in a float field becomes a float."""
    for each in dataclasses.fields(section):
        value = vars(section)[each.name]
        require(fits(value, each.type), section, each.name, described(each.type))
        if each.type is float:
            object.__setattr__(section, each.name, float(value))


def check_folder_name(section: Any, name: str) -> None:
    plain = re.fullmatch(r"\w[\w.+=-]*", vars(section)[name]) is not None
    require(plain, section, name, "a plain folder name: letters, digits and . _ + = -, such as 'run-2'")


def fits(value: Any, kind: Any) -> bool:
    """Whether a field of type `kind` takes `value`: exactly that type (True is no int), but an int for a float.

    A tuple[kind, ...] takes one value or more.
    """
    if get_origin(kind) in UNIONS:
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return type(value) is tuple and bool(value) and all(fits(each, get_args(kind)[0]) for each in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def described(kind: Any) -> str:
    """A field's type in a user's words: 'an integer or None'."""
    if get_origin(kind) in UNIONS:
        return " or ".join(described(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        several = {int: "integers", float: "finite numbers", str: "strings"}
        return f"one or more {several.get(kind, f'{kind.__name__}(...)')}"
    words = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", NoneType: "None"}
    return words.get(kind, f"a section {kind.__name__}(...)")


def unknown(name: str, valid: Iterable[str]) -> str:
    """The message for a field that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f"unknown {name!r}: " + (f"did you mean {near[0]!r}?" if near else "--help lists all fields")


def nearest_multiples(value: int, unit: int) -> str:
    """The positive multiples of `unit` below and above `value`, in words: '8 or 12'."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else f"{unit}"
