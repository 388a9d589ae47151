"""Stages of a run: what each changes of the sections, and the names by which a user knows it. Knows no arrays."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ringattn.config.checks import check_types

Whole = TypeVar("Whole")
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
"""Each field of a stage, and the section's field in whose place it stands."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    steps: int | None = None
    """Optimizer updates of the stage; None, here as below: as the config's section says."""
    seq_len: int | None = None
    """Tokens in a row (L)."""
    batch_size: int | None = None
    """Rows per update, over all devices."""
    learning_rate: float | None = None
    """Peak of the stage's schedule: each stage warms up, and falls along a cosine, anew."""
    rope_theta: float | None = None
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] | None = None
    """How the turning is slowed for rows longer than the model was trained on."""
    rope_factor: float | None = None
    """How many times longer the rows become by rope_scaling."""
    data: int | None = None
    """Devices over which the rows of a batch are spread; -1: what the other axes leave."""
    context_outer: int | None = None
    """Rings that share each row; -1: what the other axes leave."""
    context: int | None = None
    """Devices in the ring, over which each row is spread; -1: what the other axes leave."""

    def __post_init__(self) -> None:
        check_types(self)  # the sections that come of it check the rest

    def own(self) -> dict[str, Any]:
        """What the stage says itself, under the names of the sections: {'train.steps': 30}."""
        return {name: vars(self)[each] for each, name in REPLACES.items() if vars(self)[each] is not None}


def changed(config: Whole, values: Mapping[str, Any]) -> Whole:
    """`config`, a dataclass, with other values, named as a user names them: {'name': 'x', 'train.steps': 30}."""
    own = {name: value for name, value in values.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, dot, each = name.partition(".")
        if dot:
            inner.setdefault(section, {})[each] = value
    sections = {name: dataclasses.replace(vars(config)[name], **each) for name, each in inner.items()}
    return dataclasses.replace(config, **own, **sections)  # pyright: ignore[reportArgumentType]


def flag(stages: tuple[Stage, ...], number: int, name: str) -> str:
    """Where stage `number` (from 1) has its value of 'train.steps' from: that, or 'stages.2.steps'."""
    each = {name: each for each, name in REPLACES.items()}
    return f"stages.{number}.{each[name]}" if name in stages[number - 1].own() else name


@contextmanager
def said_of(stages: tuple[Stage, ...], number: int) -> Iterator[None]:
    """A ValueError of stage `number`'s own config says which stage it is, and names fields as the whole config does."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name in stages[number - 1].own():
            message = re.sub(rf"(?<![\w.]){re.escape(name)}\b", flag(stages, number, name), message)
        raise ValueError(f"stage {number}: {message}" if len(stages) > 1 else message) from error
