"""What is said to be sent is what the program sends, transfer by transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wire import transfers

from ringattn import Mask, attention
from ringattn.attention.traffic import traffic

B, H, G, D = 2, 8, 4, 16
PAIRS = [("ring", (2, 4)), ("usp", (2, 2)), ("usp", (4, 2)), ("gather", (2, 4))]


def sent(f, devices, *args):
    """Bytes that each of so many devices sends in f(*args), each collective by its best algorithm."""
    parts = {"ppermute": 1, "all_gather": devices - 1, "all_gather_invariant": devices - 1}
    parts |= dict.fromkeys(("all_to_all", "reduce_scatter"), (devices - 1) / devices)
    return sum(each.total_bytes * parts[each.primitive] for each in transfers(f, *args))


def check(mesh, shards, strategy, length, layout, dtype="float32", window=None, documents=True):
    sizes = shards if isinstance(shards, tuple) else (shards,)
    axis = mesh.axis_names if isinstance(shards, tuple) else mesh.axis_names[0]
    devices, mask = int(np.prod(sizes)), Mask(causal=True, window=window and (window, 0))
    spec = jax.P(None, axis)
    given = {"mask": mask, "layout": layout, "strategy": strategy, "axis": axis, "spec": jax.P(None, axis)}
    with jax.set_mesh(mesh):
        query = jax.device_put(jnp.ones((B, length, H, D), dtype), spec)
        key = jax.device_put(jnp.ones((B, length, G, D), dtype), spec)
        ids = jax.device_put(jnp.zeros((B, length), jnp.int32), spec) if documents else None

        def forward(query, key, value):
            return attention(query, key, value, segment_ids=ids, **given)

        def both(query, key, value):
            return jax.vjp(forward, query, key, value)[1](query)

        arrays = query, key, key
        # On a pair of axes an exchange is over one of them, so that a transfer's primitive says how many take part.
        over = sizes[-1] if strategy == "usp" else devices
        expected = sent(forward, over, *arrays), sent(both, over, *arrays)
    query, key = (jax.ShapeDtypeStruct((B, length // devices, heads, D), dtype) for heads in (H, G))  # one device's
    found = traffic(strategy, shards, query, key, mask, layout, documents)
    assert (found.forward, found.forward + found.backward) == expected
    return found


@pytest.fixture
def ring_of():
    """ring_of(members): a mesh of that many devices; ring_of((outer, inner)) has two axes."""

    def make(shards):
        sizes = shards if isinstance(shards, tuple) else (shards,)
        types = (jax.sharding.AxisType.Explicit,) * len(sizes)
        names = ("context_outer", "context")[-len(sizes) :]
        return jax.make_mesh(sizes, names, types, devices=jax.devices()[: int(np.prod(sizes))])

    return make


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_bytes_are_those_of_the_program(ring_of, strategy, dtype, documents):
    check(ring_of(4), 4, strategy, 64, "zigzag", dtype, documents=documents)


@pytest.mark.parametrize(("strategy", "shards"), PAIRS, ids=str)
def test_bytes_on_two_axes(ring_of, strategy, shards):
    found = check(ring_of(shards), shards, strategy, 64, "zigzag")
    assert found.hops == found.most == {"ring": 7, "gather": 0, "usp": shards[0] - 1}[strategy]


@pytest.mark.parametrize(
    ("layout", "window", "hops"),
    [("contiguous", None, 7), ("contiguous", 8, 1), ("contiguous", 9, 2), ("zigzag", 8, 4), ("striped", 1, 1)],
)
def test_hops_are_those_that_the_mask_needs(ring_of, layout, window, hops):
    found = check(ring_of(8), 8, "ring", 64, layout, window=window)
    assert (found.hops, found.most) == (hops, 7)


def test_a_window_on_two_axes(ring_of):
    assert check(ring_of((4, 2)), (4, 2), "ring", 64, "contiguous", window=8).hops == 3  # one outer hop, two turns


def test_a_single_device_sends_nothing(ring_of):
    for strategy in ("ring", "gather", "ulysses"):
        assert check(ring_of(1), 1, strategy, 16, "zigzag") == (0, 0, 0, 0)
