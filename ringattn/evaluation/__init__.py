"""Evaluation of checkpoints: losses on text and retrieval tasks, reported as JSON, Markdown tables and plots.

.. include:: README.md
"""

from ringattn.evaluation.cells import evaluate
from ringattn.evaluation.subject import adopt

__all__ = ["adopt", "evaluate"]
