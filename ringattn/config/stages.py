"""Training stages: section values that a stage overrides, and the options that set them."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from ringattn.config.checks import check_types, renamed, section
from ringattn.config.choices import RopeScaling

AnyConfig = TypeVar("AnyConfig")
REPLACES = {
    "steps": "train.steps",
    "seq_len": "data.seq_len",
    "batch_size": "train.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "rope_theta": "model.rope_theta",
    "rope_scaling": "model.rope_scaling",
    "rope_factor": "model.rope_factor",
    "data": "mesh.data",
    "context_outer": "mesh.context_outer",
    "context": "mesh.context",
}
"""Fields of a stage, and the section fields that they override."""


@section("stage.")
class Stage:
    steps: int | None = None
    """Number of optimizer updates in this stage. None: the value of train.steps."""
    seq_len: int | None = None
    """Tokens per row (L). None: the value of data.seq_len."""
    batch_size: int | None = None
    """Global batch size: rows per update. None: the value of train.batch_size."""
    learning_rate: float | None = None
    """Peak learning rate; each stage has its own warmup and cosine decay. None: the value of
    optimizer.learning_rate."""
    rope_theta: float | None = None
    """RoPE base frequency. None: the value of model.rope_theta."""
    rope_scaling: RopeScaling | None = None
    """RoPE scaling method for contexts beyond the training length. None: the value of model.rope_scaling."""
    rope_factor: float | None = None
    """Ratio of context length to training length, for rope_scaling. None: the value of model.rope_factor."""
    data: int | None = None
    """Size of mesh axis data; -1: the remaining devices. None: the value of mesh.data."""
    context_outer: int | None = None
    """Size of mesh axis context_outer; -1: the remaining devices. None: the value of mesh.context_outer."""
    context: int | None = None
    """Size of mesh axis context; -1: the remaining devices. None: the value of mesh.context."""

    def __post_init__(self) -> None:
        check_types(self)  # the sections check the values when `Config.stage` applies them

    def overrides(self) -> dict[str, Any]:
        """Returns the overridden section fields and their values: {'train.steps': 30}."""
        return {name: vars(self)[key] for key, name in REPLACES.items() if vars(self)[key] is not None}


def with_values(config: AnyConfig, values: Mapping[str, Any]) -> AnyConfig:
    """Returns a copy of dataclass `config` with `values` by field name: {'name': 'x', 'train.steps': 30}."""
    top = {name: value for name, value in values.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section_name, dot, field = name.partition(".")
        if dot:
            inner.setdefault(section_name, {})[field] = value
    sections = {name: dataclasses.replace(vars(config)[name], **fields) for name, fields in inner.items()}
    return dataclasses.replace(config, **top, **sections)  # pyright: ignore[reportArgumentType]


def flag(stages: tuple[Stage, ...], number: int, name: str) -> str:
    """Returns the option for `name` in stage `number`: 'train.steps', or 'stages.2.steps' if overridden."""
    field = {name: field for field, name in REPLACES.items()}
    return f"stages.{number}.{field[name]}" if name in stages[number - 1].overrides() else name


@contextmanager
def stage_errors(stages: tuple[Stage, ...], number: int) -> Iterator[None]:
    """Prefixes ValueErrors with the stage number, and makes `option` return the options of that stage."""
    with renamed({name: flag(stages, number, name) for name in REPLACES.values()}):
        try:
            yield
        except ValueError as error:
            if len(stages) == 1:
                raise
            raise ValueError(f"stage {number}: {error}") from error
