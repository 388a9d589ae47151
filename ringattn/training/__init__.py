"""Training: the step, the loop around it, and what it leaves on disk."""

from ringattn.training.loop import train
from ringattn.training.step import TrainState

__all__ = ["TrainState", "train"]
