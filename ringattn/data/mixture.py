"""Mixes rows of several sources in fixed proportions. The source of a row does not depend on the preceding rows."""

from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

_MAX_CYCLE = 100_000  # rows
_STREAM = 2**31  # part of the seed, so that the draws are independent of those that shuffle documents and rows


def integer_counts(proportions: tuple[float, ...]) -> tuple[int, ...]:
    """Returns the smallest integers with the ratio of `proportions` (all positive): (0.7, 0.3) gives (7, 3).

    Proportions are rounded to fractions with denominators of at most 1,000. Raises ValueError if the integers sum to
    more than 100,000, or if one of them is 0.
    """
    fractions = [Fraction(proportion).limit_denominator(1000) for proportion in proportions]
    integers = [int(fraction * lcm(*(other.denominator for other in fractions))) for fraction in fractions]
    counts = tuple(integer // gcd(*integers) for integer in integers) if any(integers) else (0,)
    if not all(counts) or sum(counts) > _MAX_CYCLE:
        fix = "use integers, such as 7 3 for 70% and 30%"
        raise ValueError(f"data.mixture={proportions} must be a ratio of small integers; {fix}")
    return counts


class Mixture:
    """Assigns rows to sources in cycles of `sum(counts)` rows.

    Each cycle has exactly `counts[s]` rows of source s, in an order drawn from (seed, cycle, stage).
    """

    def __init__(self, counts: tuple[int, ...], seed: int, stage: int = 0):
        self._counts, self._seed, self._stage = np.array(counts, np.int64), seed, stage
        self._cycle = lru_cache(maxsize=2)(self._draw)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each row in `rows` ([B], from 0), and the index of the row within that source."""
        cycles, offsets = np.divmod(rows, self._counts.sum())
        sources, indices = np.empty_like(rows), np.empty_like(rows)
        for cycle in np.unique(cycles):
            in_cycle = cycles == cycle
            order, rank = self._cycle(int(cycle))
            sources[in_cycle], indices[in_cycle] = order[offsets[in_cycle]], rank[offsets[in_cycle]]
        return sources, cycles * self._counts[sources] + indices

    def _draw(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each row of the cycle, and the number of earlier rows of that source in the cycle."""
        order = np.repeat(np.arange(len(self._counts)), self._counts)
        if len(self._counts) > 1:
            bits = np.random.PCG64([self._seed, cycle, _STREAM, self._stage])
            order = order[np.argsort(np.atleast_1d(bits.random_raw(order.size)), kind="stable")]
        rank = np.empty_like(order)
        for source, count in enumerate(self._counts):
            rank[order == source] = np.arange(count)
        return order, rank
