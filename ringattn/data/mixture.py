"""Rows from several sources in fixed proportions. Which source a row comes from needs none of the rows before it."""

from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

_LONGEST = 100_000  # rows in a cycle
_APART = 2**31  # keeps these draws apart from those that order documents and rows


def counts_of(shares: tuple[float, ...]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of `shares` (each positive): (0.7, 0.3) gives (7, 3).

    Shares are taken as fractions of a denominator of at most 1,000. Raises ValueError if the numbers add up to more
    than 100,000, or one is 0.
    """
    fractions = [Fraction(share).limit_denominator(1000) for share in shares]
    whole = [int(part * lcm(*(each.denominator for each in fractions))) for part in fractions]
    counts = tuple(count // gcd(*whole) for count in whole) if any(whole) else (0,)
    if not all(counts) or sum(counts) > _LONGEST:
        raise ValueError(f"data.mixture={shares} has no small whole numbers: use some, such as 7 3 for 70% and 30%")
    return counts


class Mixture:
    """Deals rows in cycles of `sum(counts)` rows, in each of which source s has exactly `counts[s]`, in an order
    drawn from (seed, cycle, stage)."""

    def __init__(self, counts: tuple[int, ...], seed: int, stage: int = 0):
        self._counts, self._seed, self._stage = np.array(counts, np.int64), seed, stage
        self._cycle = lru_cache(maxsize=2)(self._deal)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of `rows` ([B], from 0): the source it comes from, and which row of that source it is, from 0."""
        cycles, at = np.divmod(rows, self._counts.sum())
        sources, numbers = np.empty_like(rows), np.empty_like(rows)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            order, rank = self._cycle(int(cycle))
            sources[here], numbers[here] = order[at[here]], rank[at[here]]
        return sources, cycles * self._counts[sources] + numbers

    def _deal(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The cycle's sources in order, and how many rows of the same source come before each in the cycle."""
        order = np.repeat(np.arange(len(self._counts)), self._counts)
        if len(self._counts) > 1:
            bits = np.random.PCG64([self._seed, cycle, _APART, self._stage])
            order = order[np.argsort(np.atleast_1d(bits.random_raw(order.size)), kind="stable")]
        rank = np.empty_like(order)
        for source, count in enumerate(self._counts):
            rank[order == source] = np.arange(count)
        return order, rank
