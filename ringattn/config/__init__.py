"""A run's config: frozen sections, read from a file, overridden on the command line, saved. Knows no arrays."""

from ringattn.config.benchmark import Benchmark, Subject, parse_subject
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
    "Benchmark",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluate",
    "Log",
    "Mesh",
    "Model",
    "Optimizer",
    "Subject",
    "Train",
    "load",
    "nearest_multiples",
    "parse",
    "parse_subject",
    "read",
    "reported_errors",
    "save",
    "summary",
]
