"""Parses the command line: `--config FILE`, script options, and options that override values of the config.

tyro derives the options from the dataclasses, splits the command line, converts the values and writes --help. Four
parts are hand-written:

- Error messages. tyro prints a box of several lines, often without the nearest option, and has no public API to change
  that. Every option therefore accepts any words, and `_converted` calls tyro's converter of the field's type.
- Options of stages, numbered from 1. tyro numbers the items of a tuple from 0.
- Restriction to the sections that a script uses. tyro would hide the other options but still accept them.
- `_check_effect`, which rejects a value that every stage overrides.
"""

import contextlib
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ringattn.config.checks import UNIONS, described, fits, unknown
from ringattn.config.files import SCRIPTS, Kind, read
from ringattn.config.sections import Config
from ringattn.config.stages import REPLACES, Stage, with_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a script that are not config values. A script with more such options defines a subclass."""

    config: str | None = None
    """Python file that defines `config`, or config.json of an earlier run. Required."""


ScriptOptions = TypeVar("ScriptOptions", bound=Options)
WordOptions = TypeVar("WordOptions")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """On ValueError, prints `error: message` and exits with status 2. Other exceptions keep their traceback."""
    try:
        yield
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(message: str) -> str:
    """Returns a message as one printable line. Shortens long words, which come from a command line or a file."""
    printable = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)
    return re.sub(r"\S{600,}", lambda word: f"{word[0][:400]}...{word[0][-100:]}", printable)


Adopt = Callable[[Kind, Collection[str]], Kind]
"""Completes a config from a file that it names, given the names of the options on the command line."""


def parse(
    argv: Sequence[str], description: str, kind: type[Kind] = Config, adopt: Adopt[Kind] = lambda c, given: c
) -> Kind:
    """Returns the config of a command line: `--config FILE`, then `--section.field VALUE` overrides, then `adopt`.

    Several values of one option are separate words. The last value of a repeated option counts, so that a script can
    append options. --help prints all options and exits. On an invalid command line, prints a one-line message that
    suggests the nearest option and exits with status 2.
    """
    return parse_with(Options, argv, description, kind, adopt=adopt)[1]


def parse_with(
    options: type[ScriptOptions],
    argv: Sequence[str],
    description: str,
    kind: type[Kind] = Config,
    sections: Collection[str] | None = None,
    adopt: Adopt[Kind] = lambda c, given: c,
    required: bool = True,
) -> tuple[ScriptOptions, Kind]:
    """Returns the script options and the config; see `parse`. Only `sections` of the config become options.

    Unless `required`, a command line without --config starts from the default config.
    """
    with reported_errors():
        values, rest = _Parser(Options()).parse(argv, add_help=False)
        path = values.get("config")
        if path is None and required and not {"-h", "--help"} & set(argv):
            misspelt = [word for word in rest if difflib.get_close_matches(word.partition("=")[0], ["--config"])]
            if misspelt:
                raise ValueError(unknown(misspelt[0].partition("=")[0], ["--config"]))
            raise ValueError(f"--config is required, such as --config {SCRIPTS[kind][1]}")
        config = kind() if path is None else read(Path(path), kind)
        parser = _Parser(options(), config, sections)
        values, rest = parser.parse(argv, description=description)
        if rest:
            raise ValueError(_refusal(rest[0], config, list(parser.kinds)))
        script_values = {name: values.pop(name) for name in vars(options()) if name in values}
        given = {*values, *(_fields(config) if path is not None and path.endswith(".json") else ())}
        return options(**script_values), adopt(_override(config, values), given)


def parse_words(
    options: type[WordOptions], names: Sequence[str], argv: Sequence[str], description: str
) -> tuple[WordOptions, list[str]]:
    """Returns the options and the words of a script without config, such as `SOURCE TARGET --option VALUE`.

    `names` are those of the words, all required, before the options. Errors and --help are those of `parse`.
    """
    with reported_errors():
        parser = _Parser(options())
        values, rest = parser.parse(argv, description=description)
        for word in rest:
            if word.startswith("--"):
                raise ValueError(unknown(word.partition("=")[0], [f"--{name}" for name in parser.kinds]))
        if len(rest) != len(names):
            given = f"{len(rest)} given" if rest else "none given"
            raise ValueError(f"{' '.join(names)} are required, before options ({given}); see --help")
        return options(**values), rest


class _Parser:
    """Parses the script options and the options of the fields `names` of a config (None: all)."""

    def __init__(self, options: Any, config: Any = None, names: Collection[str] | None = None) -> None:
        self.kinds: dict[str, Any] = {}
        """Types of the options by full name: 'model.heads'."""
        self._words: dict[str, list[str]] = {}
        self._fields = [_without_default(field) for field in self._options(options, "")]
        self.kinds = {
            name: get_args(kind)[0] for name, kind in self.kinds.items()
        }  # T of `T | None`: None only means not given
        if config is not None:
            self._fields += self._options(config, "", names)

    def parse(self, argv: Sequence[str], **settings: Any) -> tuple[dict[str, Any], list[str]]:
        """Returns the given values by full option name, and the words that belong to no option."""
        registry = ConstructorRegistry()
        registry.struct_rule(lambda info: info.default if info.type is StructConstructorSpec else None)
        settings |= {"registry": registry, "use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
        group = _group("", self._fields)
        _, rest = tyro.cli(group.type, args=argv, default=group.default, return_unknown_args=True, **settings)
        return {name: _converted(name, words, self.kinds[name]) for name, words in self._words.items()}, rest

    def _options(self, values: Any, prefix: str, names: Collection[str] | None = None) -> list[StructFieldSpec]:
        spec = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(type(values), values, in_union_context=False))
        assert isinstance(spec, StructConstructorSpec)
        return [self._option(field, prefix) for field in spec.fields if names is None or field.name in names]

    def _option(self, field: StructFieldSpec, prefix: str) -> StructFieldSpec:
        name = prefix + field.name
        if dataclasses.is_dataclass(field.default):
            return _group(field.name, self._options(field.default, f"{name}."))
        if name == "stages":
            stages = enumerate(field.default, 1)
            return _group(name, [_group(str(n), self._options(stage, f"stages.{n}.")) for n, stage in stages])
        self.kinds[name] = field.type
        store = functools.partial(self._words.__setitem__, name)  # tyro would print a converter's error in a box
        spec = dataclasses.replace(_spec(field.type), nargs="*", choices=None, instance_from_str=store)
        spec = dataclasses.replace(spec, metavar=_metavar(field.type))
        text = field.helptext() if callable(field.helptext) else field.helptext
        text = " ".join((text or "").split())  # tyro would keep some line breaks of the docstring
        return dataclasses.replace(field, type=Annotated[field.type, spec], helptext=text)


def _without_default(field: StructFieldSpec) -> StructFieldSpec:
    shown = tyro.conf.arg(metavar=field.name.upper(), help_behavior_hint="")
    return dataclasses.replace(field, type=Annotated[field.type, shown])


def _metavar(kind: Any) -> str:
    """Returns the values that --help shows for a type: 'INT or None', 'STR ...', '{True,False}'."""
    args = get_args(kind)
    if get_origin(kind) in UNIONS:
        names = [_metavar(part) for part in args if part is not NoneType]
        names = [name for name in names if f"{name} ..." not in names]  # 'STR ...' already covers 'STR'
        return " or ".join(names + ["None"] * (NoneType in args))
    if get_origin(kind) is tuple:
        return f"{_metavar(args[0])} ..."
    choices = ("True", "False") if kind is bool else args
    return f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()


def _group(name: str, fields: list[StructFieldSpec]) -> StructFieldSpec:
    return StructFieldSpec(name, StructConstructorSpec, StructConstructorSpec(dict, tuple(fields)))


def _spec(kind: Any) -> PrimitiveConstructorSpec:
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return spec


def _converted(name: str, words: list[str], kind: Any) -> Any:
    """Converts the words after option `name` to a value of type `kind`."""
    spec = _spec(kind)
    if not words:
        raise ValueError(f"--{name} needs a value: {described(kind)}")
    if spec.nargs == 1 and len(words) > 1:
        raise ValueError(_unexpected(words[1]))
    with contextlib.suppress(ValueError):
        value = spec.instance_from_str(words)
        if set(words) <= set(spec.choices or words) and fits(value, kind):
            return value
    raise ValueError(f"--{name} {' '.join(words)} must be {described(kind)}")


def _unexpected(word: str) -> str:
    return f"unexpected {word!r}; write options as --option VALUE"


def _refusal(word: str, config: Any, valid: list[str]) -> str:
    """Returns the message for a word that is neither an option nor a value."""
    if not word.startswith("--"):
        return _unexpected(word)
    name = word[2:].partition("=")[0].replace("-", "_")
    if name in _Parser(Options(), config).kinds:
        return f"--{name} is an option of {SCRIPTS[type(config)][0]}, not of this script; see this script's --help"
    if not (name.startswith("stage") and isinstance(config, Config)):
        return unknown(f"--{name}", [f"--{option}" for option in valid if not option.startswith("stages.")])
    number = (re.findall(r"\d+", name) or ["1"])[0]
    stage_options = {f"--stages.{number}.{field}": field for field in REPLACES}
    if f"--{name}" not in stage_options:
        return unknown(f"--{name}", stage_options)
    count = len(config.stages)
    fix = f"use --stages.{count}.{stage_options[f'--{name}']}, or add a Stage(...) to the config file"
    return f"--{name}: stage {number} does not exist, the config has stages 1 to {count}; {fix}"


def _fields(config: Any) -> Iterator[str]:
    """Yields the options of all fields: a config.json sets each of them."""
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            yield from (f"{name}.{field}" for field in vars(value))
        else:
            yield name


def _override(config: Kind, values: dict[str, Any]) -> Kind:
    if not isinstance(config, Config):
        return with_values(config, values)
    stages = list(config.stages)
    for name in [name for name in values if name.startswith("stages.")]:
        _, number, field = name.split(".")
        stages[int(number) - 1] = dataclasses.replace(stages[int(number) - 1], **{field: values.pop(name)})
    _check_effect(tuple(stages), values)
    return with_values(config, values | {"stages": tuple(stages)})


def _check_effect(stages: tuple[Stage, ...], values: dict[str, Any]) -> None:
    """Raises ValueError for a value that every stage overrides."""
    for field, name in REPLACES.items():
        if name in values and all(name in stage.overrides() for stage in stages):
            fix = " ".join(f"--stages.{number}.{field} {values[name]}" for number in range(1, len(stages) + 1))
            raise ValueError(f"--{name} {values[name]} has no effect, because every stage overrides it; use {fix}")
