"""Benchmarks of attention: time and temporary memory, compared with dense attention and PyPI ringattention.

.. include:: README.md
"""

from ringattn.benchmark.measure import benchmark

__all__ = ["benchmark"]
