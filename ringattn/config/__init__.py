"""A run's config: frozen sections, read from a file, overridden on the command line, saved. Knows no arrays."""

from ringattn.config.checks import nearest_multiples
from ringattn.config.reading import load, parse, read, reported_errors, save, summary
from ringattn.config.sections import (
    Attention,
    Checkpoint,
    Config,
    Data,
    Evaluate,
    Log,
    Mesh,
    Model,
    Optimizer,
    Train,
)

__all__ = [
    "Attention",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluate",
    "Log",
    "Mesh",
    "Model",
    "Optimizer",
    "Train",
    "load",
    "nearest_multiples",
    "parse",
    "read",
    "reported_errors",
    "save",
    "summary",
]
