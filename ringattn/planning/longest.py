"""Results of searches for the longest rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """The memory that a step needs, in bytes per device."""

    refusal: str | None
    """The reason why the step does not fit; None if it fits."""
    peak: int | None
    """Memory of the device; None if the compiler refused the step without a figure."""
    host: int | None
    """Memory of the host; None if the compiler refused the step."""


@dataclass(frozen=True)
class MaxContext:
    """The longest rows that compile and fit."""

    tokens: int
    """Tokens per row."""
    refused: int | None
    """The shortest length tried that does not fit; None if all fit."""
    tried: dict[int, Need]
    """The lengths tried."""


@dataclass(frozen=True)
class Reach:
    """The longest rows on so many devices."""

    topology: str
    devices: int
    found: MaxContext
    """With 0 tokens if no rows fit."""
