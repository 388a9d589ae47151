"""Scores on every mesh agree with those of one device, in the order of the tokens."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import attention, config
from ringattn.data import Batch
from ringattn.mesh.axes import SEQUENCE
from ringattn.model import scoring
from ringattn.model.scoring import make_scorer
from ringattn.model.transformer import Transformer

MODEL = config.Model(layers=1, dim=16, heads=2, kv_heads=2, head_dim=8, feed_forward=32)


def score(mesh, layout, strategy, batches, microbatches=1):
    """Scores `batches` on `mesh`. Raises AssertionError if the step compiles more than once."""
    attend = partial(attention, axis=SEQUENCE, layout=layout, strategy=strategy)

    def make_model():
        return Transformer(MODEL, 50, attend, nnx.Rngs(params=0))

    chex.clear_trace_counter()
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "token_scores", chex.assert_max_traces(scoring.token_scores, n=1))
        params = jax.jit(lambda: nnx.split(make_model())[1])()
        return list(make_scorer(make_model, 50, mesh, layout, microbatches)(params, batches))


@pytest.fixture(scope="module")
def batches():
    """More batches than are dispatched ahead, with two documents per row."""
    tokens = np.random.default_rng(0).integers(0, 50, (5, 4, 65), dtype=np.int32)
    positions = np.broadcast_to(np.r_[np.arange(40), np.arange(24)].astype(np.int32), (4, 64))
    segments = np.broadcast_to(np.r_[np.zeros(40), np.ones(24)].astype(np.int32), (4, 64))
    weights = np.ones((4, 64), np.float32)
    return [Batch(rows[:, :-1], rows[:, 1:], positions, segments, weights) for rows in tokens]


@pytest.fixture(scope="module")
def one_device(batches, make_mesh):
    return score(make_mesh(), "contiguous", "ring", batches)


@pytest.mark.parametrize(
    ("sizes", "layout", "strategy", "microbatches"),
    [
        ({"context": 8}, "zigzag", "ring", 1),
        ({"data": 2, "context": 4}, "striped", "gather", 2),
        ({"context_outer": 2, "context": 2, "data": 2}, "contiguous", "usp", 1),
    ],
)
def test_scores_do_not_depend_on_the_mesh(make_mesh, batches, one_device, sizes, layout, strategy, microbatches):
    scores = score(make_mesh(**sizes), layout, strategy, batches, microbatches)
    assert len(scores) == 5
    for actual, expected in zip(scores, one_device, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        np.testing.assert_allclose(actual.nats, expected.nats, atol=1e-5)
        np.testing.assert_array_equal(actual.predictions, expected.predictions)
        assert expected.nats.std() > 0.05


def test_batches_of_another_shape_compile_again(make_mesh, batches):
    other = Batch(*(x[:2] for x in batches[0]))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        score(make_mesh(), "contiguous", "ring", [batches[0], other])
