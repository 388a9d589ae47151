"""Evaluation of checkpoints: losses on text and retrieval tasks, reported as JSON, Markdown tables and plots.

.. include:: README.md
"""

from ringattn.evaluation.cells import evaluate

__all__ = ["evaluate"]
