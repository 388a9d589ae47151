"""Model FLOPs: unmasked pairs, matrix weights, a step computed by hand."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import Mask, attention, config
from ringattn.attn.mask import Tokens, visible
from ringattn.cost.flops import peak_flops, product_weights, step_flops, visible_pairs
from ringattn.data import Batch
from ringattn.hardware import CHIPS
from ringattn.model.transformer import Transformer


def rows(*segments):
    """A batch with these segment ids, one list per row; negative ids are padding."""
    ids = np.array(segments, np.int32)
    positions = np.zeros_like(ids)
    for column in range(1, ids.shape[1]):
        positions[:, column] = np.where(ids[:, column] == ids[:, column - 1], positions[:, column - 1] + 1, 0)
    return Batch(ids * 0, ids * 0, positions, ids, np.ones(ids.shape, np.float32))


PACKED = rows([0] * 24, [0] * 9 + [1] * 1 + [2] * 14, [0] * 5 + [1] * 12 + [-1] * 7)


@pytest.mark.parametrize("window", [None, 0, 1, 4, 11, 23, 100])
def test_visible_pairs_agree_with_the_mask(window):
    mask = Mask(causal=True, window=None if window is None else (window, 0))
    tokens = Tokens(np.tile(np.arange(24, dtype=np.int32), (3, 1)), PACKED.segment_ids)
    seen = visible(mask, tokens, tokens)  # by positions in the row, as attention does
    assert visible_pairs(PACKED.positions, PACKED.segment_ids, window) == int(seen.sum())
    seen = visible(mask, tokens._replace(segments=None), tokens._replace(segments=None))
    assert visible_pairs(np.tile(np.arange(24, dtype=np.int32), (3, 1)), None, window) == int(seen.sum())


@pytest.mark.parametrize("tied", [True, False])
def test_product_weights_are_the_matrices_of_the_model(make_mesh, tied):
    c = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48, tied=tied)
    with jax.set_mesh(make_mesh()):
        model = nnx.eval_shape(lambda: Transformer(c, 128, attention, nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    norms = (2 * c.layers + 1) * c.dim
    assert product_weights(c, 128) == parameters - norms - (0 if tied else 128 * c.dim)


def test_step_flops_agree_with_a_count_by_hand():
    c = config.Config(model=config.Model(layers=3, dim=8, heads=2, kv_heads=1, head_dim=4, feed_forward=16))
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 100 * 8
    pairs = 24 * 25 // 2 + 9 * 10 // 2 + 1 + 14 * 15 // 2 + 5 * 6 // 2 + 12 * 13 // 2
    assert step_flops(c, 100, PACKED) == 6 * weights * (24 + 24 + 17) + 3 * 3 * 4 * (2 * 4) * pairs
    joined = PACKED._replace(positions=np.tile(np.arange(24, dtype=np.int32), (3, 1)), segment_ids=None)
    assert step_flops(c, 100, joined) == 6 * weights * 72 + 3 * 3 * 4 * (2 * 4) * 3 * 24 * 25 // 2
    more = replace(c, model=replace(c.model, vocabulary=128))  # unused ids are multiplied too
    assert step_flops(more, 100, PACKED) - step_flops(c, 100, PACKED) == 6 * 28 * 8 * (24 + 24 + 17)


def test_the_pairs_of_each_kind_of_layers_are_counted():
    c = config.Config(
        model=config.Model(layers=3, heads=2, kv_heads=1, head_dim=4, window=4, pattern=("full", "window"))
    )
    pairs = [visible_pairs(PACKED.positions, PACKED.segment_ids, window) for window in (None, 4, None)]
    products = 6 * product_weights(c.model, 100) * (24 + 24 + 17)
    assert step_flops(c, 100, PACKED) == products + 3 * 4 * (2 * 4) * sum(pairs)


def test_peak_flops_sums_all_devices(monkeypatch):
    assert peak_flops() is None
    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v4"])
    assert peak_flops() == 8 * 275e12
