import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.layout import LAYOUTS, check_length, order, permute, positions_of, shard_positions, unpermute


def defined_positions(layout: str, shard: int, shards: int, length: int) -> list[int]:
    """Returns the positions of a shard by the definition of the layout, token by token."""
    if layout == "contiguous":
        return [position for position in range(length) if position // (length // shards) == shard]
    if layout == "striped":
        return [position for position in range(length) if position % shards == shard]
    piece = length // (2 * shards)
    return [position for position in range(length) if position // piece in (shard, 2 * shards - 1 - shard)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_shards_have_the_positions_of_the_definition(layout, shards):
    length = 6 * shards
    for shard in range(shards):
        positions = shard_positions(layout, shard, shards, length // shards)
        assert positions.dtype == np.int32
        assert positions.tolist() == defined_positions(layout, shard, shards, length)
        traced = jax.jit(lambda index: shard_positions(layout, index, shards, length // shards))(jnp.int32(shard))
        assert traced.dtype == jnp.int32
        np.testing.assert_array_equal(traced, positions)
    together = np.concatenate([shard_positions(layout, shard, shards, length // shards) for shard in range(shards)])
    np.testing.assert_array_equal(order(layout, length, shards), together)


@settings(deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    shards=st.integers(1, 9),
    pieces=st.integers(1, 4),
    dim=st.integers(0, 2),
    array=st.sampled_from([np.asarray, jnp.asarray]),
)
def test_unpermute_is_the_exact_inverse(layout, shards, pieces, dim, array):
    shape = [2, 3, 2]
    shape[dim] = 2 * shards * pieces
    x = array(np.arange(np.prod(shape), dtype=np.int32).reshape(shape))
    permuted = permute(x, layout, shards, dim)
    assert permuted.dtype == x.dtype
    np.testing.assert_array_equal(permuted, np.take(np.asarray(x), order(layout, shape[dim], shards), axis=dim))
    np.testing.assert_array_equal(unpermute(permuted, layout, shards, dim), x)
    np.testing.assert_array_equal(permute(unpermute(x, layout, shards, dim), layout, shards, dim), x)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_causal_work_is_balanced_in_zigzag_and_almost_in_striped(shards):
    local = 24

    def max_over_mean(layout: str) -> float:
        work = [np.sum(shard_positions(layout, shard, shards, local) + 1) for shard in range(shards)]
        return max(work) / np.mean(work)

    assert max_over_mean("zigzag") == 1
    assert max_over_mean("striped") < 1.05
    assert max_over_mean("contiguous") > 1.45


@pytest.mark.parametrize(
    ("length", "layout", "shards", "message"),
    [
        (
            4097,
            "zigzag",
            8,
            r"data.seq_len=4097 must be a positive multiple of 2 \* mesh.context = 16 .*; use 4096 or 4112$",
        ),
        (24, "zigzag", 8, "=24 .*; use 16 or 32, or layout='contiguous'"),
        (10, "striped", 4, "=10 .* of mesh.context = 4 .*; use 8 or 12"),
        (3, "contiguous", 4, "=3 .*; use 4$"),
        (0, "contiguous", 4, "=0 .*; use 4$"),
        (8, "spiral", 4, "layout='spiral' must be one of 'contiguous', 'striped', 'zigzag'"),
    ],
)
def test_a_length_that_does_not_fit_raises_with_lengths_that_fit(length, layout, shards, message):
    with pytest.raises(ValueError, match=message):
        check_length(length, layout, shards, "data.seq_len", "mesh.context")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_permute_raises_for_a_length_that_does_not_fit(layout):
    with pytest.raises(ValueError, match="positive multiple"):
        permute(np.zeros((1, 7), np.float32), layout, 4)


@pytest.mark.parametrize("function", [permute, unpermute])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3, 4], "zigzag", 2), r"x=\[1, 2, 3, 4\] must be a NumPy or JAX array; use np.asarray\(x\)"),
        (({"tokens": np.zeros((1, 4))}, "zigzag", 2), r"x={'tokens'.* must be .*; use .* jax.tree.map"),
        ((None, "zigzag", 2), "x=None must be a NumPy or JAX array"),
        ((np.zeros(8), "zigzag", 2), r"dim=1 must be a dim of x \(8,\); use the index of the sequence dim"),
        ((np.zeros((1, 8)), "zigzag", 2, "L"), r"dim='L' must be a dim of x \(1, 8\)"),
        ((np.zeros((1, 8)), "zigzag", 0), "shards=0 must be a positive int, the number of devices"),
        ((np.zeros((1, 8)), "zigzag", 2.0), "shards=2.0 must be a positive int"),
        ((np.zeros((1, 8)), "zig-zag", 2), "layout='zig-zag' must be one of 'contiguous', 'striped', 'zigzag'"),
    ],
)
def test_permute_refuses_wrong_arguments(function, arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_permute_takes_a_negative_dim():
    x = np.arange(16).reshape(2, 8)
    np.testing.assert_array_equal(permute(x, "zigzag", 2, -1), permute(x, "zigzag", 2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_of_consecutive_shards(layout):
    all_positions = order(layout, 48, 6)
    for first, count in [(0, 6), (2, 3), (5, 1)]:
        positions = positions_of(layout, first, count, 6, 8)
        np.testing.assert_array_equal(positions, all_positions[8 * first : 8 * (first + count)])
        assert positions.dtype == np.int32
