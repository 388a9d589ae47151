"""Training: the step, the loop around it, validation, plots.

.. include:: README.md
"""

from ringattn.training.launch import Choose, Chosen
from ringattn.training.loop import train
from ringattn.training.step import TrainState

__all__ = ["Choose", "Chosen", "TrainState", "train"]
