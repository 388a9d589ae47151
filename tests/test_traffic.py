"""The formulas for traffic agree with the transfers in traced programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wire import transfers

from ringattn import Mask, attention
from ringattn.attn.traffic import traffic

B, H, G, D = 2, 8, 4, 16
PAIRS = [("ring", (2, 4)), ("usp", (2, 2)), ("usp", (4, 2)), ("gather", (2, 4))]


def sent(f, devices, *args):
    """Returns the bytes that each device sends in f(*args), for the best algorithm of each collective."""
    factors = {"ppermute": 1, "all_gather": devices - 1, "all_gather_invariant": devices - 1}
    factors |= dict.fromkeys(("all_to_all", "reduce_scatter"), (devices - 1) / devices)
    return sum(transfer.total_bytes * factors[transfer.primitive] for transfer in transfers(f, *args))


def check(mesh, shards, strategy, length, layout, dtype="float32", window=None, documents=True):
    sizes = shards if isinstance(shards, tuple) else (shards,)
    axis = mesh.axis_names if isinstance(shards, tuple) else mesh.axis_names[0]
    devices, mask = int(np.prod(sizes)), Mask(causal=True, window=window and (window, 0))
    spec = jax.P(None, axis)
    options = {"mask": mask, "layout": layout, "strategy": strategy, "axis": axis, "spec": jax.P(None, axis)}
    with jax.set_mesh(mesh):
        query = jax.device_put(jnp.ones((B, length, H, D), dtype), spec)
        key = jax.device_put(jnp.ones((B, length, G, D), dtype), spec)
        ids = jax.device_put(jnp.zeros((B, length), jnp.int32), spec) if documents else None

        def forward(query, key, value):
            return attention(query, key, value, segment_ids=ids, **options)

        def both(query, key, value):
            return jax.vjp(forward, query, key, value)[1](query)

        arrays = query, key, key
        # With a pair of axes only the inner one exchanges; all other collectives but permutes use all devices.
        members = sizes[-1] if strategy == "usp" else devices
        expected = sent(forward, members, *arrays), sent(both, members, *arrays)
    query, key = (jax.ShapeDtypeStruct((B, length // devices, heads, D), dtype) for heads in (H, G))  # local shapes
    result = traffic(strategy, shards, query, key, mask, layout, documents)
    assert (result.forward, result.forward + result.backward) == expected
    return result


@pytest.fixture
def ring_mesh():
    """Returns ring_mesh(members), which makes a mesh of one axis; ring_mesh((outer, inner)) has two axes."""

    def make(shards):
        sizes = shards if isinstance(shards, tuple) else (shards,)
        types = (jax.sharding.AxisType.Explicit,) * len(sizes)
        names = ("context_outer", "context")[-len(sizes) :]
        return jax.make_mesh(sizes, names, types, devices=jax.devices()[: int(np.prod(sizes))])

    return make


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "no documents"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_bytes_equal_those_of_the_program(ring_mesh, strategy, dtype, documents):
    check(ring_mesh(4), 4, strategy, 64, "zigzag", dtype, documents=documents)


@pytest.mark.parametrize(("strategy", "shards"), PAIRS, ids=str)
def test_bytes_on_two_axes(ring_mesh, strategy, shards):
    result = check(ring_mesh(shards), shards, strategy, 64, "zigzag")
    assert result.hops == result.max_hops == {"ring": 7, "gather": 0, "usp": shards[0] - 1}[strategy]


@pytest.mark.parametrize(
    ("layout", "window", "hops"),
    [("contiguous", None, 7), ("contiguous", 8, 1), ("contiguous", 9, 2), ("zigzag", 8, 4), ("striped", 1, 1)],
)
def test_only_needed_hops_count(ring_mesh, layout, window, hops):
    result = check(ring_mesh(8), 8, "ring", 64, layout, window=window)
    assert (result.hops, result.max_hops) == (hops, 7)


def test_a_window_on_two_axes(ring_mesh):
    # One hop on the outer ring, and one on the inner ring for each of two shards.
    assert check(ring_mesh((4, 2)), (4, 2), "ring", 64, "contiguous", window=8).hops == 3


def test_a_single_device_sends_nothing(ring_mesh):
    for strategy in ("ring", "gather", "ulysses"):
        assert check(ring_mesh(1), 1, strategy, 16, "zigzag") == (0, 0, 0, 0)
