"""Reads and writes configs: a Python file that defines `config`, or config.json of a run directory."""

import dataclasses
import difflib
import json
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any, TypeVar

from ringattn.config.benchmark import Benchmark
from ringattn.config.checks import renamed, unknown
from ringattn.config.evaluation import Evaluation
from ringattn.config.generation import Generation
from ringattn.config.sections import Config
from ringattn.config.stages import Stage

Kind = TypeVar("Kind", Config, Benchmark, Evaluation, Generation)
SCRIPTS: dict[type, tuple[str, str]] = {
    Config: ("scripts/train.py", "configs/quickstart.py"),
    Benchmark: ("scripts/benchmark.py", "configs/benchmark.py"),
    Evaluation: ("scripts/eval.py", "configs/eval_needle.py"),
    Generation: ("scripts/generate.py", "configs/generate.py"),
}
"""For each kind of config, a script that takes it and an example file."""
MAX_BYTES = 2**24
"""Maximum size of a JSON file."""


def read(path: Path, kind: type[Kind] = Config) -> Kind:
    """Reads the config from a Python file that defines `config`, or from a JSON file. Raises ValueError."""
    try:
        is_file = path.is_file()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"config file {path} cannot be opened ({error.strerror})") from None
    if not is_file:
        if path.is_dir():
            raise ValueError(f"config file {path} is a directory; use a .py or .json file in it")
        files = {file.name: file for place in (Path("configs"), path.parent) for file in place.glob("*.*")}
        near = difflib.get_close_matches(path.name if path.suffix else f"{path.name}.py", files, n=1)
        suggestion = f": did you mean {files[near[0]]}?" if near else ""
        raise ValueError(f"config file {path} does not exist{suggestion}")
    if path.suffix == ".json":
        return load(path, kind)
    if path.suffix != ".py":
        raise ValueError(f"config file {path} must end in .py or .json")
    config = _run(path).get("config")
    if type(config) in SCRIPTS and not isinstance(config, kind):
        raise ValueError(_other_kind(path, type(config), kind))
    if not isinstance(config, kind):
        problem = "defines no `config`" if config is None else f"defines `config` as {type(config).__name__}"
        raise ValueError(f"{path} {problem}; write `config = {kind.__name__}(...)`, from ringattn.config")
    return config


def _run(path: Path) -> dict[str, Any]:
    """Runs a Python file, which may import files of its directory, and returns its globals."""
    siblings = {file.stem for file in path.parent.glob("*.py")} - set(sys.modules)
    directory = str(path.resolve().parent)
    sys.path.insert(0, directory)
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # a user's file can raise any exception
        raise ValueError(_located(error, path)) from None
    finally:
        sys.path.remove(directory)
        for name in siblings:  # the next config file may import a file of the same name from another directory
            sys.modules.pop(name, None)


def _located(error: Exception, path: Path) -> str:
    """Returns the message of `error`, prefixed with the file and line of the user's code that raised it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno or 1}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(".py") and Path(frame.filename).resolve().parent == path.resolve().parent
    ]
    location = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else f"{path}"
    return f"{location}: {error}" if type(error) is ValueError else f"{location}: {type(error).__name__}: {error}"


def _other_kind(path: Path, kind: type, expected: type) -> str:
    script, example = SCRIPTS[kind][0], SCRIPTS[expected][1]
    actual, required = (f"{'an' if k.__name__[0] in 'AEIOU' else 'a'} {k.__name__}" for k in (kind, expected))
    return f"{path} defines {actual} for {script}; use {required}, such as {example}"


def load(path: Path, kind: type[Kind] = Config) -> Kind:
    """Reads a config written by `to_json`. Raises ValueError that names the file and the problem."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}, so it is not a config")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply, so it is not a config") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for other in SCRIPTS:
        names = {field.name for field in dataclasses.fields(other)}
        if other is not kind and isinstance(values, dict) and values.keys() == names:
            raise ValueError(_other_kind(path, other, kind))
    try:
        return _build(kind, values, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object. Raises ValueError for a name that occurs twice: json would take the last."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:80]!r} occurs twice")
        values[name] = value
    return values


def _build(kind: type, values: Any, prefix: str) -> Any:
    """Builds a dataclass from parsed JSON. `prefix`, such as 'stages.2.', precedes its fields in messages."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}={values!r:.200} must be a JSON object")
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    built = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(unknown(prefix + name, [prefix + valid for valid in kinds]))
        if dataclasses.is_dataclass(kinds[name]):
            value = _build(kinds[name], value, f"{name}.")
        elif name == "stages" and isinstance(value, list):
            value = [_build(Stage, stage, f"stages.{number}.") for number, stage in enumerate(value, 1)]
        built[name] = tuple(value) if isinstance(value, list) else value  # JSON has only lists
    with renamed({f"stage.{name}": prefix + name for name in kinds}):  # Stage names its fields without its number
        return kind(**built)


def to_json(config: Any) -> str:
    """Returns the config as JSON, including defaults; `load` restores an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def summary(config: Config) -> str:
    """Returns the section values that differ from the defaults, one line per section. Omits stages."""
    lines = [f"config {config.name} (section values that differ from the defaults)"]
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    for section in (name for name, value in values.items() if isinstance(value, dict)):
        changes = [f"{name}={value}" for name, value in values[section].items() if value != defaults[section][name]]
        lines += [f"  {section:<10} {'  '.join(changes)}"] if changes else []
    return "\n".join(lines)
