"""Config sections and their validation. Messages name the field, its value, the rule and a fix."""

import dataclasses
import difflib
import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

Kind = TypeVar("Kind")
UNIONS = (UnionType, Union)
"""Origins of `int | None` and `Literal[...] | None`, which Python represents by different types."""
PREFIXES: dict[type, str] = {}
"""Prefix of each section's fields in messages: 'model.' for Model, '' for a top-level config."""
_OPTIONS: ContextVar[Mapping[str, str] | None] = ContextVar("options", default=None)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def section(prefix: str = "") -> Callable[[type[Kind]], type[Kind]]:
    """Makes a class a frozen, keyword-only dataclass whose fields have `prefix` in messages: 'model.heads'.

    The constructor raises ValueError for an unknown field and suggests the nearest one. Python's TypeError would not
    name the section as a user writes it.
    """

    def decorate(kind: type[Kind]) -> type[Kind]:
        kind = dataclasses.dataclass(frozen=True, kw_only=True)(kind)
        names, init = [field.name for field in dataclasses.fields(kind)], kind.__init__  # pyright: ignore

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **values: Any) -> None:
            for name in values:
                if name not in names:
                    raise ValueError(unknown(prefix + name, [prefix + valid for valid in names]))
            init(self, *args, **values)

        kind.__init__ = checked
        PREFIXES[kind] = prefix
        return kind

    return decorate


def option(field: str) -> str:
    """Returns the option name of a field for messages: 'train.steps', or 'stages.2.steps' inside `renamed`."""
    return (_OPTIONS.get() or {}).get(field, field)


def as_option(value: Any) -> str:
    """Returns a value as it is written on the command line: '3 4' for (3, 4)."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@contextmanager
def renamed(options: Mapping[str, str]) -> Iterator[None]:
    """Renames options in messages inside the context: {'train.steps': 'stages.2.steps'}."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def require(holds: bool, section: Any, name: str, rule: str) -> None:
    """Raises ValueError('model.heads=6 must be <rule>') unless `holds`."""
    if not holds:
        raise ValueError(f"{option(PREFIXES[type(section)] + name)}={vars(section)[name]!r:.200} must be {rule}")


def at_least(low: int, section: Any, *names: str, at_most: float = math.inf) -> None:
    rule = f"at least {low}" if at_most == math.inf else f"from {low} to {at_most}"
    for name in names:
        require(low <= vars(section)[name] <= at_most, section, name, rule)


def check_types(section: Any) -> None:
    """Raises ValueError for a value of the wrong type. Converts ints in float fields to float."""
    for field in dataclasses.fields(section):
        value = vars(section)[field.name]
        require(fits(value, field.type), section, field.name, described(field.type))
        if field.type is float:
            object.__setattr__(section, field.name, float(value))


def check_directory_name(section: Any, name: str) -> None:
    valid = re.fullmatch(r"\w[\w.+=-]*", vars(section)[name]) is not None
    require(valid, section, name, "a plain directory name: letters, digits and . _ + = -, such as 'run-2'")


def check_distinct(section: Any, *names: str) -> None:
    for name in names:
        values = vars(section)[name]
        require(len(set(values)) == len(values), section, name, "free of duplicates")


def fits(value: Any, kind: Any) -> bool:
    """Returns True if a field of type `kind` accepts `value`.

    Types must match exactly (True is not an int), except that float fields accept ints. Tuples must not be empty.
    """
    if get_origin(kind) in UNIONS:
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return type(value) is tuple and bool(value) and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def described(kind: Any) -> str:
    """Describes a field's type for messages: 'an integer or None'."""
    if get_origin(kind) in UNIONS:
        return " or ".join(described(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            return f"one or more of {', '.join(map(repr, get_args(kind)))}"
        several = {int: "integers", float: "finite numbers", str: "strings"}
        return f"one or more {several.get(kind, f'{kind.__name__}(...)')}"
    words = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", NoneType: "None"}
    return words.get(kind, f"a section {kind.__name__}(...)")


def unknown(name: str, valid: Iterable[str]) -> str:
    """Returns the message for an unknown name, with the field of that name in another section, or the nearest name."""
    valid = list(valid)
    field = name.rpartition(".")[2]
    near = [other for other in valid if "." in name and other.rpartition(".")[2] == field]
    if len(near) != 1:
        near = difflib.get_close_matches(name, valid, n=1)
    return f"unknown {name!r:.100}: " + (f"did you mean {near[0]!r}?" if near else "--help lists all options")


def nearest_multiples(value: int, unit: int) -> str:
    """Returns the positive multiples of `unit` nearest to `value` as text: '8 or 12'."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else f"{unit}"
