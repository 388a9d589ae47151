"""How fast attention is, and what memory it takes, beside what else there is: measured, told, kept."""

from ringattn.benchmark.run import benchmark

__all__ = ["benchmark"]
