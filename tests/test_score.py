"""Scores of tokens are those of a plain model, in the order in which the rows were given."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import attention, config
from ringattn.data import Batch
from ringattn.mesh import SEQUENCE
from ringattn.model import Transformer
from ringattn.training.score import make_scorer

MODEL = config.Model(layers=1, dim=16, heads=2, kv_heads=2, head_dim=8, feed_forward=32)


def scored(mesh, layout, strategy, batches, parts=1):
    attend = partial(attention, axis=SEQUENCE, layout=layout, strategy=strategy)
    with jax.set_mesh(mesh):

        def make_model():
            return Transformer(MODEL, 50, attend, nnx.Rngs(params=0))

        params = jax.jit(lambda: nnx.split(make_model())[1])()
        return list(make_scorer(make_model, 50, mesh, layout, parts)(params, batches))


@pytest.mark.parametrize(
    ("sizes", "layout", "strategy", "parts"),
    [
        ({"context": 8}, "zigzag", "ring", 1),
        ({"data": 2, "context": 4}, "striped", "gather", 2),
        ({"context_outer": 2, "context": 2, "data": 2}, "contiguous", "usp", 1),
    ],
)
def test_scores_do_not_depend_on_the_mesh(make_mesh, sizes, layout, strategy, parts):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (5, 4, 65), dtype=np.int32)
    places = np.broadcast_to(np.r_[np.arange(40), np.arange(24)].astype(np.int32), (4, 64))
    segments = np.broadcast_to(np.r_[np.zeros(40), np.ones(24)].astype(np.int32), (4, 64))
    ones = np.ones((4, 64), np.float32)
    batches = [Batch(row[:, :-1], row[:, 1:], places, segments, ones) for row in tokens]  # more than are on their way
    plain = scored(make_mesh(), "contiguous", "ring", batches)
    found = scored(make_mesh(**sizes), layout, strategy, batches, parts)
    assert len(found) == 5
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, atol=1e-5)
        np.testing.assert_array_equal(one.best, other.best)
        assert one.nats.std() > 0.05
