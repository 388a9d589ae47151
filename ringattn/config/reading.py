"""From a user's words to a config and back: a file that defines it, command-line overrides, config.json."""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

import tyro

from ringattn.config.checks import described, fits, prefix, unknown
from ringattn.config.sections import Config


def _kinds(section: Any) -> dict[str, Any]:
    """A section's own fields, with their types."""
    return {each.name: each.type for each in dataclasses.fields(section)}


def _all_kinds() -> dict[str, Any]:
    """Every field as a user writes it ('model.heads', 'name'), with its type."""
    own = _kinds(Config)
    sections = {name: kind for name, kind in own.items() if dataclasses.is_dataclass(kind)}
    inner = {f"{name}.{each}": kind for name in sections for each, kind in _kinds(sections[name]).items()}
    return {name: kind for name, kind in own.items() if name not in sections} | inner


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Ends the process with `error: message` and status 2 on a ValueError; other errors keep their traceback."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(argv: Sequence[str], description: str) -> Config:
    """The config of a command line: `--config FILE`, then `--section.field VALUE` overrides; --help lists all.

    A user's mistake ends the process with one message that names the nearest valid field, status 2.
    """
    with reported_errors():
        asked = {"-h", "--help"} & set(argv)
        flags = _flags([word for word in argv if word not in asked])
        path = flags.pop("config", None)
        if path is None and not asked:
            raise ValueError("no config given: name a file, such as --config configs/quickstart.py")
        config = Config() if path is None else read(Path(path))
        words = [f"--{name}={text}" for name, text in flags.items()]
        return _override(config, words + ["--help"] * bool(asked), description)


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """Fields and their values as text; names and types are checked here, where one line can say what is wrong."""
    kinds, flags, words = _all_kinds() | {"config": str}, {}, iter(argv)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"unexpected {word!r}: write --section.field VALUE")
        name = name.replace("-", "_")
        if name not in kinds:
            raise ValueError(unknown(f"--{name}", [f"--{valid}" for valid in kinds]))
        text = text if equals else next(words, "--")
        if not equals and text.startswith("--"):
            raise ValueError(f"--{name} needs a value: {described(kinds[name])}")
        value = text if kinds[name] is str or get_origin(kinds[name]) is Literal else _value(text)
        if not fits(value, kinds[name]):
            raise ValueError(f"--{name} {text} must be {described(kinds[name])}")
        flags[name] = text
    return flags


def _value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"None": None, "True": True, "False": False}.get(text, text)


def _override(config: Config, words: list[str], description: str) -> Config:
    usage = "--config FILE: a Python file that defines `config`, or a run's config.json. The rest overrides it."
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    try:
        # tyro frames its messages and wraps them: take the reason alone.
        with contextlib.redirect_stderr(io.StringIO()) as said:
            text = f"{description}\n{usage}"
            return tyro.cli(Config, description=text, args=words, default=config, use_underscores=True, config=markers)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        reason = stop.__context__
        while reason is not None and type(reason) is not ValueError:
            reason = reason.__context__
        raise ValueError(reason or said.getvalue()) from None


def read(path: Path) -> Config:
    """The config in a Python file that defines `config`, or in a run's config.json; raises ValueError."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.*")], n=1)
        raise ValueError(f"no config file {path}" + (f": did you mean {path.with_name(near[0])}?" if near else ""))
    if path.suffix == ".json":
        return load(path)
    if path.suffix != ".py":
        raise ValueError(f"config file {path} must end in .py or .json")
    folder = str(path.resolve().parent)
    siblings = {each.stem for each in path.parent.glob("*.py")} - set(sys.modules)
    sys.path.insert(0, folder)  # so that a config may edit its neighbour: `from quickstart import config`
    try:
        found = runpy.run_path(str(path))
    except Exception as error:  # whatever somebody's file raises
        raise ValueError(_blame(error, path)) from None
    finally:
        sys.path.remove(folder)
        for name in siblings:
            sys.modules.pop(name, None)
    config = found.get("config")
    if not isinstance(config, Config):
        kind = "no `config`" if config is None else f"`config` as {type(config).__name__}"
        raise ValueError(f"{path} defines {kind}: it must say `config = Config(...)`, of ringattn.config")
    return config


def _blame(error: Exception, path: Path) -> str:
    """File, line and reason; a field that does not exist is answered with the nearest that does."""
    folder = path.resolve().parent
    calls = traceback.extract_tb(error.__traceback__)
    calls = [call for call in calls if Path(call.filename).resolve().parent == folder and call.filename.endswith(".py")]
    place = f"{calls[-1].filename}, line {calls[-1].lineno}" if calls else f"{path}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    misspelt = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    sections = {kind.__name__: kind for kind in (Config, *_kinds(Config).values()) if dataclasses.is_dataclass(kind)}
    if misspelt and misspelt[1] in sections:
        section = sections[misspelt[1]]
        valid = [prefix(section) + name for name in _kinds(section)]
        return f"{place}: {unknown(prefix(section) + misspelt[2], valid)}"
    return f"{place}: {error}" if type(error) is ValueError else f"{place}: {type(error).__name__}: {error}"


def load(path: Path) -> Config:
    """The config that `save` wrote; raises ValueError that names the file and what is wrong with it."""
    try:
        return _build(Config, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _build(section: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix(section).rstrip('.') or 'the config'}={values!r} must be a JSON object")
    kinds = _kinds(section)
    for name in values:
        if name not in kinds:
            raise ValueError(unknown(prefix(section) + name, [prefix(section) + valid for valid in kinds]))
    inner = {name: _build(kinds[name], values[name]) for name in values if dataclasses.is_dataclass(kinds[name])}
    return section(**(values | inner))


def save(config: Config, path: Path) -> None:
    """Writes the whole config as JSON; `load` gives an equal one. The file is there entirely or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def summary(config: Config) -> str:
    """A line a section, of the values that differ from the defaults; all of them are in the run's config.json."""
    lines = [f"config {config.name} (where it differs from the defaults)"]
    values, usual = dataclasses.asdict(config), dataclasses.asdict(Config())
    for section in (name for name, value in values.items() if isinstance(value, dict)):
        changed = [f"{name}={value}" for name, value in values[section].items() if value != usual[section][name]]
        lines += [f"  {section:<10} {'  '.join(changed)}"] if changed else []
    return "\n".join(lines)
