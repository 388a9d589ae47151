"""The pairs of tiles that are visited, and the sizes of tiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringattn.attn.kernels import tiles
from ringattn.attn.kernels.protocol import KV, Queries
from ringattn.attn.mask import Mask, Tokens, visible
from ringattn.layout import order


def visits(mask: Mask, tokens: Tokens, size: int) -> np.ndarray:
    """Counts the visits of each pair of tiles: [unmasked or masked, row tiles, query tiles, key tiles]."""
    length = tokens.positions.shape[1]
    x = jnp.zeros((2, 1, length, 1))
    queries, kv = Queries(x[:, :, None], tokens), KV(x, x, tokens)
    counts = jnp.zeros((2, 2, length // size, length // size), jnp.int32)

    def step(pair: tiles.TilePair, counts, masked: bool):
        assert (pair.queries, pair.keys) == (size, size)
        return counts.at[int(masked), pair.first_row, pair.first_query // size, pair.first_key // size].add(1)

    plan = partial(tiles.plan_tiles, mask, queries, kv, (size, size))
    return np.asarray(jax.jit(lambda counts: plan().visit(step, counts))(counts))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(False), Mask(window=(20, 0)), Mask(False, (5, 12)), Mask(chunk=32)], ids=str
)
@pytest.mark.parametrize("documents", [1, 3, 8])
def test_only_pairs_of_tiles_with_a_visible_key_are_visited(mask, documents, layout, monkeypatch):
    monkeypatch.setattr(tiles, "MAX_LOGITS", 1)
    positions = order(layout, 128, 4)[None]
    segments = np.stack([positions[0] * documents // 128, np.zeros(128, np.int32)]).astype(np.int32)
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(segments))
    seen = np.asarray(visible(mask, tokens, tokens)).reshape(2, 16, 8, 16, 8)
    unmasked, masked = visits(mask, tokens, 8)
    np.testing.assert_array_equal(unmasked, seen.all((2, 4)))
    np.testing.assert_array_equal(masked, seen.any((2, 4)) & ~seen.all((2, 4)))


def test_rows_in_one_tile_visit_what_either_sees():
    segments = np.stack([np.arange(64) // 16, np.arange(64) // 32]).astype(np.int32)
    tokens = Tokens(jnp.arange(64, dtype=jnp.int32)[None], jnp.asarray(segments))
    seen = np.asarray(visible(Mask(), tokens, tokens)).reshape(2, 8, 8, 8, 8)
    unmasked, masked = visits(Mask(), tokens, 8)
    np.testing.assert_array_equal(unmasked[0], seen.all((0, 2, 4)))
    np.testing.assert_array_equal((unmasked + masked)[0], seen.any((0, 2, 4)))
    assert not (unmasked + masked)[1].any()


@pytest.mark.parametrize(
    ("length", "size"), [(1024, 512), (512, 256), (1000, 500), (7, 7), (1, 1), (2 * 521, 1), (81, 81)]
)
def test_tile_size_divides_half_the_length(length, size):
    assert tiles.tile_size(length, 512) == size


def test_lengths_without_good_tiles_are_padded():
    x, tokens = jnp.zeros((1, 1, 1042, 1)), Tokens(jnp.arange(1042, dtype=jnp.int32)[None])
    queries, kv = Queries(x[:, :, None], tokens), KV(x[:, :, :512], x[:, :, :512], Tokens(tokens.positions[:, :512]))
    queries, kv = tiles.pad_to_tiles(queries, kv, (512, 512))
    assert queries.query.shape[3] == 1536
    assert kv.key.shape[2] == 512
    assert (np.asarray(queries.tokens.segments)[:, 2 * 521 :] == -1).all()
    assert (np.asarray(kv.tokens.segments) == 0).all()


@pytest.mark.parametrize(("length", "size"), [(1024, 512), (512, 256), (384, 384), (256, 128), (640, 128), (100, 0)])
def test_tile_size_with_a_multiple(length, size):
    assert tiles.tile_size(length, 512, 128) == size


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 128), (100, 128), (200, 256), (384, 384), (1042, 1536), (8192, 8192)]
)
def test_lengths_are_padded_to_a_multiple(length, padded):
    x, tokens = jnp.zeros((1, 1, length, 1)), Tokens(jnp.arange(length, dtype=jnp.int32)[None])
    queries, kv = tiles.pad_to_tiles(Queries(x[:, :, None], tokens), KV(x, x, tokens), (512, 512), 128)
    assert queries.query.shape[3] == kv.key.shape[2] == padded
    assert tiles.tile_size(padded, 512, 128) >= 128
