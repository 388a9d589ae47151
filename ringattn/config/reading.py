"""From a user's words to a config and back: a file that defines it, command-line overrides, config.json."""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import tyro

from ringattn.config.benchmark import Benchmark
from ringattn.config.checks import UNIONS, described, fits, prefix, unknown
from ringattn.config.evaluation import Evaluation
from ringattn.config.sections import Config
from ringattn.config.stages import REPLACES, Stage, changed

Kind = TypeVar("Kind", Config, Benchmark, Evaluation)
SCRIPTS: dict[type, tuple[str, str]] = {
    Config: ("scripts/train.py", "configs/quickstart.py"),
    Benchmark: ("scripts/benchmark.py", "configs/benchmark.py"),
    Evaluation: ("scripts/eval.py", "configs/eval_needle.py"),
}
"""Each kind of whole config: a script that takes it, and a file that defines one."""


def _kinds(section: Any) -> dict[str, Any]:
    """A section's own fields, with their types."""
    return {each.name: each.type for each in dataclasses.fields(section)}


def _sections(kind: type) -> dict[str, Any]:
    """The fields of a whole config that are sections."""
    return {name: each for name, each in _kinds(kind).items() if dataclasses.is_dataclass(each)}


def _all_kinds(kind: type, argv: Sequence[str]) -> dict[str, Any]:
    """Every field as a user writes it ('model.heads', 'name'), with its type.

    Those of stages bear the stage's number ('stages.2.steps'): they are given for stage 1, and all that argv names.
    """
    sections = _sections(kind)
    if "stages" in _kinds(kind):
        numbers = [re.match(r"--stages\.(\d+)\.", word) for word in argv]
        sections |= {f"stages.{number}": Stage for number in ("1", *(found[1] for found in numbers if found))}
    inner = {f"{name}.{each}": type_ for name in sections for each, type_ in _kinds(sections[name]).items()}
    return {name: type_ for name, type_ in _kinds(kind).items() if name not in {*sections, "stages"}} | inner


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Ends the process with `error: message` and status 2 on a ValueError; other errors keep their traceback."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(argv: Sequence[str], description: str, kind: type[Kind] = Config) -> Kind:
    """The config of a command line: `--config FILE`, then `--section.field VALUE` overrides; --help lists all.

    A field that holds several values takes them as several words. A user's mistake ends the process with one message
    that names the nearest valid field, status 2.
    """
    with reported_errors():
        asked = {"-h", "--help"} & set(argv)
        flags = _flags([word for word in argv if word not in asked], kind)
        path = flags.pop("config", None)
        if path is None and not asked:
            raise ValueError(f"no config given: name a file, such as --config {SCRIPTS[kind][1]}")
        config = _override(kind() if path is None else read(Path(path), kind), flags)
        if asked:
            _help(config, description)
        return config


def _flags(argv: Sequence[str], kind: type) -> dict[str, Any]:
    """Fields and their values; names and types are checked here, where one line can say what is wrong."""
    kinds, flags, words = _all_kinds(kind, argv) | {"config": str}, {}, list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"unexpected {word!r}: write --section.field VALUE")
        name = name.replace("-", "_")
        if name not in kinds:
            of_stages = name.startswith("stage")  # else '--learning_rate' would be nearest to a stage's
            valid = [f"--{each}" for each in kinds if each.startswith("stages.") == of_stages]
            raise ValueError(unknown(f"--{name}", valid))
        parts = get_args(kinds[name]) if get_origin(kinds[name]) in UNIONS else (kinds[name],)
        several, texts = [part for part in parts if get_origin(part) is tuple], [text] * bool(equals)
        while words and not words[0].startswith("--") and (several or not texts):
            texts.append(words.pop(0))
        if not texts:
            raise ValueError(f"--{name} needs a value: {described(kinds[name])}")
        values = tuple(_value(text, get_args(several[0])[0] if several else kinds[name]) for text in texts)
        one = not several or (values == (None,) and NoneType in parts)
        flags[name] = values[0] if one else values
        if not fits(flags[name], kinds[name]):
            raise ValueError(f"--{name} {' '.join(texts)} must be {described(kinds[name])}")
    return flags


def _value(text: str, kind: Any) -> Any:
    if kind is str or get_origin(kind) is Literal:
        return text
    if str in get_args(kind):
        return None if text == "None" else text
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return {"None": None, "True": True, "False": False}.get(text, text)


def _override(config: Kind, flags: dict[str, Any]) -> Kind:
    of_stages = {name: value for name, value in flags.items() if name.startswith("stages.")}
    rest = {name: value for name, value in flags.items() if name not in of_stages}
    if not isinstance(config, Config):
        return changed(config, rest)
    stages = list(config.stages)
    for name, value in of_stages.items():
        _, number, each = name.split(".")
        if not 0 < int(number) <= len(stages):
            cure = f"use --stages.{len(stages)}.{each}, or add a Stage(...) to the config's file"
            raise ValueError(f"--{name}, but the config's stages are numbered 1 to {len(stages)}: {cure}")
        stages[int(number) - 1] = dataclasses.replace(stages[int(number) - 1], **{each: value})
    _check_effect(tuple(stages), rest)
    return changed(config, rest | {"stages": tuple(stages)})


def _check_effect(stages: tuple[Stage, ...], flags: dict[str, Any]) -> None:
    """Raises ValueError for a flag that every stage overrules."""
    for each, name in REPLACES.items():
        if name in flags and all(name in stage.own() for stage in stages):
            cure = " ".join(f"--stages.{number}.{each} {flags[name]}" for number in range(1, len(stages) + 1))
            raise ValueError(f"--{name} {flags[name]} changes nothing, for every stage has its own: use {cure}")


def _help(config: Any, description: str) -> NoReturn:
    usage = "--config FILE: a Python file that defines `config`, or a run's config.json. The rest overrides it."
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    text, kind = f"{description}\n{usage}", type(config)
    if isinstance(config, Config):
        kind, config = _with_numbered_stages(config)
    tyro.cli(kind, description=text, args=["--help"], default=config, use_underscores=True, config=markers)
    raise AssertionError("--help ends the process")


def _with_numbered_stages(config: Config) -> tuple[type, Any]:
    """For --help: a class like Config, and its value, whose stages are a section of stages numbered from 1."""
    numbered = {f"stage_{number}": stage for number, stage in enumerate(config.stages, 1)}
    kinds = [(name, Annotated[Stage, tyro.conf.arg(name=name.removeprefix("stage_"))]) for name in numbered]
    stages = dataclasses.make_dataclass("Stages", kinds, frozen=True)
    unchecked = {"__post_init__": lambda self: None}
    kind = dataclasses.make_dataclass(
        "Config", [("stages", stages)], bases=(Config,), frozen=True, kw_only=True, namespace=unchecked
    )
    return kind, kind(**(vars(config) | {"stages": stages(**numbered)}))


def read(path: Path, kind: type[Kind] = Config) -> Kind:
    """The config in a Python file that defines `config`, or in a run's config.json; raises ValueError."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.*")], n=1)
        raise ValueError(f"no config file {path}" + (f": did you mean {path.with_name(near[0])}?" if near else ""))
    if path.suffix == ".json":
        return load(path, kind)
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
    if type(config) in SCRIPTS and not isinstance(config, kind):
        raise ValueError(f"{path} {_other_kind(type(config), kind)}")
    if not isinstance(config, kind):
        there = "no `config`" if config is None else f"`config` as {type(config).__name__}"
        raise ValueError(f"{path} defines {there}: it must say `config = {kind.__name__}(...)`, of ringattn.config")
    return config


def _other_kind(found: type, kind: type) -> str:
    (its_script, _), (script, example) = SCRIPTS[found], SCRIPTS[kind]
    one, other = (f"{'an' if each.__name__[0] in 'AEIOU' else 'a'} {each.__name__}" for each in (found, kind))
    return f"holds {one}, for {its_script}: {script} takes {other}, such as --config {example}"


def _blame(error: Exception, path: Path) -> str:
    """File, line and reason; a field that does not exist is answered with the nearest that does."""
    folder = path.resolve().parent
    calls = traceback.extract_tb(error.__traceback__)
    calls = [call for call in calls if Path(call.filename).resolve().parent == folder and call.filename.endswith(".py")]
    place = f"{calls[-1].filename}, line {calls[-1].lineno}" if calls else f"{path}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    misspelt = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    sections = {kind.__name__: kind for whole in SCRIPTS for kind in (whole, Stage, *_sections(whole).values())}
    if misspelt and misspelt[1] in sections:
        section = sections[misspelt[1]]
        valid = [prefix(section) + name for name in _kinds(section)]
        return f"{place}: {unknown(prefix(section) + misspelt[2], valid)}"
    return f"{place}: {error}" if type(error) is ValueError else f"{place}: {type(error).__name__}: {error}"


def load(path: Path, kind: type[Kind] = Config) -> Kind:
    """The config that `save` wrote; raises ValueError that names the file and what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for other in SCRIPTS:
        if other is not kind and isinstance(values, dict) and values.keys() == _kinds(other).keys():
            raise ValueError(f"{path} {_other_kind(other, kind)}")
    try:
        return _build(kind, values, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _build(section: type, values: Any, before: str) -> Any:
    """A dataclass from JSON's objects and lists; `before` is how its fields' names begin in messages: 'stages.2.'."""
    if not isinstance(values, dict):
        raise ValueError(f"{before.rstrip('.') or 'the config'}={values!r} must be a JSON object")
    kinds, found = _kinds(section), {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(unknown(before + name, [before + valid for valid in kinds]))
        if dataclasses.is_dataclass(kinds[name]):
            value = _build(kinds[name], value, f"{name}.")
        elif name == "stages" and isinstance(value, list):
            value = [_build(Stage, each, f"stages.{number}.") for number, each in enumerate(value, 1)]
        # JSON knows no tuples.
        found[name] = tuple(value) if isinstance(value, list) else value
    try:
        return section(**found)
    except ValueError as error:
        own = str(error).removeprefix(prefix(section))
        raise ValueError(str(error) if own == str(error) else before + own) from None


def save(config: Any, path: Path) -> None:
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
