"""Exact proportions in every cycle, rows of each source in order, and a source that depends only on the row index."""

import numpy as np
import pytest

from ringattn.data.mixture import Mixture, integer_counts


@pytest.mark.parametrize(
    ("proportions", "counts"),
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
def test_proportions_become_the_smallest_integers(proportions, counts):
    assert integer_counts(proportions) == counts


@pytest.mark.parametrize("proportions", [(0.0001, 1.0), (1.0, 0.123, 0.457, 0.919, 1 / 997)])
def test_proportions_without_small_integers_raise(proportions):
    with pytest.raises(ValueError, match="must be a ratio of small integers; use integers, such as 7 3"):
        integer_counts(proportions)


def test_every_cycle_is_exact_and_the_rows_of_a_source_are_in_order():
    mixture = Mixture((3, 1, 4), seed=5)
    sources, indices = mixture.locate(np.arange(800))
    assert all(np.bincount(cycle).tolist() == [3, 1, 4] for cycle in sources.reshape(-1, 8))
    for source, count in enumerate((3, 1, 4)):
        assert indices[sources == source].tolist() == list(range(100 * count))
    assert len({cycle.tobytes() for cycle in sources.reshape(-1, 8)}) > 50


def test_a_row_does_not_depend_on_the_preceding_rows():
    whole = Mixture((2, 5), seed=1).locate(np.arange(100))
    some = np.array([93, 94, 8, 0])
    for part, full in zip(Mixture((2, 5), seed=1).locate(some), whole, strict=True):
        assert part.tolist() == full[some].tolist()
    other = Mixture((2, 5), seed=2).locate(np.arange(100))
    assert other[0].tolist() != whole[0].tolist()
