"""Keeps the figures of compiled steps in the user's cache directory, so that no step is compiled twice.

It keeps figures, not programs: JAX's persistent compilation cache writes programs for devices that are not present, but
cannot load them (jax 0.10.2: "PjRtCompiler must be constructed with a Client to call DeserializeLoadedExecutable").
"""

import dataclasses
import datetime
import hashlib
import json
import os
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ringattn import config
from ringattn.planning.compile import Plan, Target, compile_plan
from ringattn.planning.longest import Need
from ringattn.planning.parallel import needed_apart
from ringattn.runs.files import write_text

SECTIONS = ("model", "data", "mesh", "attention", "optimizer", "train")
"""Config sections that the compiled step depends on."""
_CUDA = (f"jax-cuda{number}-{part}" for number in (12, 13) for part in ("plugin", "pjrt"))
_NVIDIA = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", *_CUDA, *_NVIDIA)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
Figures = TypeVar("Figures", Plan, Need)


def user_directory() -> Path:
    """Returns the directory for plans in the user's cache directory, by the convention of the platform."""
    home = Path.home()
    default = {"darwin": home / "Library/Caches", "win32": home / "AppData/Local"}.get(sys.platform, home / ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "ringattn" / "plans"


class Cache:
    """Compiles steps, or reads their figures from a directory where an earlier call has written them.

    The figures apply to the same sections of the config, topology, limit, versions of packages, compiler flags and
    source files of ringattn. Files that are damaged are ignored. Steps for CPU devices are always compiled: their limit
    is the memory of this machine.
    """

    def __init__(self, directory: Path | None) -> None:
        """`directory`: None keeps nothing."""
        self._directory = directory

    def plan(self, c: config.Config, target: Target) -> Plan:
        """Returns `compile_plan(c, target)`. `Plan.cached` is the date if the plan was read."""
        return self._figures(Plan, compile_plan, c, target)

    def need(self, c: config.Config, target: Target) -> Need:
        """Returns `needed(c, target)`, perhaps compiled in another process."""
        return self._figures(Need, needed_apart, c, target)

    def _figures(
        self, kind: type[Figures], make: Callable[[config.Config, Target], Figures], c: config.Config, target: Target
    ) -> Figures:
        if self._directory is None or target.device.platform == "cpu":
            return make(c, target)
        path = self._directory / f"{kind.__name__.lower()}-{key(c, target)}.json"
        with suppress(OSError, ValueError, TypeError, KeyError):
            return _read(kind, path)
        figures = make(c, target)
        with suppress(OSError):  # without a cache, the step is compiled again
            path.parent.mkdir(parents=True, exist_ok=True)
            content = dataclasses.asdict(figures)
            if kind is Plan:
                content["cached"] = f"{datetime.date.today()}"
            write_text(path, json.dumps({"sha256": _digest(content), "content": content}))
        return figures


def key(c: config.Config, target: Target) -> str:
    """Returns a hash of all that the figures of a step depend on."""
    values = dataclasses.asdict(c)
    return _digest(
        {
            "config": {name: values[name] for name in SECTIONS},
            "target": [target.topology, dict(target.mesh.shape), target.limit],
            "packages": {name: _version(name) for name in PACKAGES},
            "flags": {name: os.environ.get(name) for name in FLAGS},
            "sources": _sources(),
        }
    )


def _sources() -> str:
    """Returns a hash of the source files of ringattn."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(kind: type[Figures], path: Path) -> Figures:
    """Returns the figures in a file. Raises OSError, ValueError, TypeError or KeyError if it is absent or damaged."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    if entry["sha256"] != _digest(entry["content"]):
        raise ValueError(f"{path} is damaged")
    return restored(kind, entry["content"])


def restored(kind: Any, value: Any) -> Any:
    """Returns a value of type `kind` from its JSON: dataclasses as objects, keys of dicts as text."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: restored(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    arguments = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(each for each in arguments if each is not type(None))
        return None if value is None else restored(inner, value)
    if get_origin(kind) is list:
        return [restored(arguments[0], each) for each in value]
    if get_origin(kind) is dict:
        return {arguments[0](name): restored(arguments[1], each) for name, each in value.items()}
    return value
