"""Does a model use its context? Losses and retrieval, with numbers and pictures."""

from ringattn.evaluation.run import evaluate

__all__ = ["evaluate"]
