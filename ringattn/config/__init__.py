"""A run's config: frozen sections, read from a file, overridden on the command line, saved. Knows no arrays."""

from ringattn.config.benchmark import Benchmark, Subject, parse_subject
from ringattn.config.checks import nearest_multiples
from ringattn.config.evaluation import Evaluation
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
from ringattn.config.stages import Stage, flag, said_of
from ringattn.config.tasks import LOSSES, RETRIEVAL, TASK

__all__ = [
    "LOSSES",
    "RETRIEVAL",
    "TASK",
    "Attention",
    "Benchmark",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluate",
    "Evaluation",
    "Log",
    "Mesh",
    "Model",
    "Optimizer",
    "Stage",
    "Subject",
    "Train",
    "flag",
    "load",
    "nearest_multiples",
    "parse",
    "parse_subject",
    "read",
    "reported_errors",
    "said_of",
    "save",
    "summary",
]
