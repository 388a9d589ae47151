"""Configs: frozen sections, read from a file and overridden on the command line."""

from ringattn.config.benchmark import Benchmark, Subject, parse_subject
from ringattn.config.checks import as_option, nearest_multiples, option
from ringattn.config.command_line import Options, parse, parse_with, parse_words, reported_errors
from ringattn.config.evaluation import Evaluation
from ringattn.config.files import load, read, summary, to_json
from ringattn.config.generation import Generation
from ringattn.config.sections import (
    Attention,
    Checkpoint,
    Config,
    Data,
    Log,
    Mesh,
    Model,
    Optimizer,
    Train,
    Validation,
)
from ringattn.config.stages import Stage, flag, stage_errors
from ringattn.config.tasks import GENERATED, LOSSES, RETRIEVAL, TASK

__all__ = [
    "GENERATED",
    "LOSSES",
    "RETRIEVAL",
    "TASK",
    "Attention",
    "Benchmark",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluation",
    "Generation",
    "Log",
    "Mesh",
    "Model",
    "Optimizer",
    "Options",
    "Stage",
    "Subject",
    "Train",
    "Validation",
    "as_option",
    "flag",
    "load",
    "nearest_multiples",
    "option",
    "parse",
    "parse_subject",
    "parse_with",
    "parse_words",
    "read",
    "reported_errors",
    "stage_errors",
    "summary",
    "to_json",
]
