"""Weights of Hugging Face, GGUF and runs: load them onto a mesh, compute logits, save them for transformers.

.. include:: README.md
"""

from ringattn.model.transformer import count_parameters
from ringattn.weights.loaded import Loaded
from ringattn.weights.loading import load
from ringattn.weights.origin import Origin, adopt, find_origin
from ringattn.weights.saving import check_target, save
from ringattn.weights.saving_run import save_run

__all__ = [
    "Loaded",
    "Origin",
    "adopt",
    "check_target",
    "count_parameters",
    "find_origin",
    "load",
    "save",
    "save_run",
]
