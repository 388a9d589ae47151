"""Matplotlib figures of masks and of work per device and hop."""

import numpy as np

from ringattn.attn.mask import Mask
from ringattn.visualize import Row, balance_figure, dense_mask, imbalance, mask_figure, pairs_per_hop, sent_hops

ROWS = {"even": Row(64, 4, "zigzag"), "window": Row(64, 4, mask=Mask(window=(16, 0)))}


def test_a_balance_figure_shows_the_work_and_the_sent_hops():
    for axes, (title, row) in zip(balance_figure(ROWS).axes, ROWS.items(), strict=False):
        shown = axes.images[0].get_array()
        assert shown is not None
        np.testing.assert_allclose(shown, 100 * pairs_per_hop(row) / row.local**2)
        assert axes.get_title().startswith(f"{title}\nmax/mean {imbalance(row):.2f};")
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        assert len(hatched) == row.shards - 1 - len(sent_hops(row))


def test_a_mask_figure_shows_the_visible_pairs():
    for axes, row in zip(mask_figure(ROWS).axes, ROWS.values(), strict=True):
        shown = axes.images[0].get_array()
        assert shown is not None
        np.testing.assert_array_equal((np.asarray(shown) < 1).any(-1), dense_mask(row))
