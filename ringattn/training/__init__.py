"""Training: the step, the loop around it, validation, plots.

.. include:: README.md
"""

from ringattn.training.loop import train
from ringattn.training.step import TrainState

__all__ = ["TrainState", "train"]
