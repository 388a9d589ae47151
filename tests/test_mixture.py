"""Rows from several sources: exact in every cycle, each source's rows in turn, from the row's number alone."""

import numpy as np
import pytest

from ringattn.data.mixture import Mixture, counts_of


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ((0.7, 0.3), (7, 3)),
        ((7.0, 3.0), (7, 3)),
        ((2.0, 1.0), (2, 1)),
        ((0.333333, 0.666667), (1, 2)),
        ((0.005, 0.995), (1, 199)),
        ((0.5, 0.25, 0.25), (2, 1, 1)),
        ((4.0, 8.0), (1, 2)),
    ],
)
def test_shares_become_the_smallest_whole_numbers(shares, counts):
    assert counts_of(shares) == counts


@pytest.mark.parametrize("shares", [(0.0001, 1.0), (1.0, 0.123, 0.457, 0.919, 1 / 997)])
def test_shares_without_small_whole_numbers_are_refused(shares):
    with pytest.raises(ValueError, match="has no small whole numbers: use some, such as 7 3"):
        counts_of(shares)


def test_every_cycle_is_exact_and_every_row_of_a_source_comes_in_turn():
    mixture = Mixture((3, 1, 4), seed=5)
    sources, numbers = mixture.places(np.arange(800))
    assert all(np.bincount(cycle).tolist() == [3, 1, 4] for cycle in sources.reshape(-1, 8))
    for source, count in enumerate((3, 1, 4)):
        assert numbers[sources == source].tolist() == list(range(100 * count))
    assert len({cycle.tobytes() for cycle in sources.reshape(-1, 8)}) > 50


def test_a_row_needs_no_row_before_it():
    whole = Mixture((2, 5), seed=1).places(np.arange(100))
    some = np.array([93, 94, 8, 0])
    for part, full in zip(Mixture((2, 5), seed=1).places(some), whole, strict=True):
        assert part.tolist() == full[some].tolist()
    other = Mixture((2, 5), seed=2).places(np.arange(100))
    assert other[0].tolist() != whole[0].tolist()
