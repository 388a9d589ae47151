"""Masks by definition, token by token, and the bounds derived from it."""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.attn.mask import Mask, Tokens, bounds, relate, visible

SIDES = st.integers(0, 12)
WINDOWS = st.none() | SIDES | st.tuples(SIDES, SIDES)
FIELDS = {"causal": st.booleans(), "window": WINDOWS, "chunk": st.none() | st.integers(1, 12)}
MASKS = st.builds(Mask, **FIELDS)


def sees(mask: Mask, i: int, j: int, segments: tuple[int, int] = (0, 0), spans: tuple[int, int] = (-1, -1)) -> bool:
    """The definition for one query at position i and one key at position j."""
    left, right = mask.window if isinstance(mask.window, tuple) else (mask.window, mask.window)
    if segments[0] != segments[1] or segments[0] < 0:
        return False
    if mask.causal and j > i and not (spans[0] == spans[1] and spans[0] >= 0):
        return False
    if (left is not None and j < i - left) or (right is not None and j > i + right):
        return False
    return mask.chunk is None or i // mask.chunk == j // mask.chunk


@st.composite
def tokens(draw, count: int, ids: bool):
    """Draws tokens with random positions and ids. Few values, so that they are often equal."""

    def draw_values(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), np.int32)

    return Tokens(draw_values(0, 25), draw_values(-1, 2) if ids else None, draw_values(-1, 2) if ids else None)


@st.composite
def two_tiles(draw):
    ids = draw(st.booleans())
    return draw(tokens(3, ids)), draw(tokens(4, ids))


def brute_force(mask: Mask, q: Tokens, k: Tokens) -> np.ndarray:
    def pair(ids_q, ids_k, a: int, b: int, default: int) -> tuple[int, int]:
        return (default, default) if ids_q is None else (ids_q[a], ids_k[b])

    return np.array(
        [
            [
                sees(mask, i, j, pair(q.segments, k.segments, a, b, 0), pair(q.spans, k.spans, a, b, -1))
                for b, j in enumerate(k.positions)
            ]
            for a, i in enumerate(q.positions)
        ]
    )


def test_every_field_of_a_mask_is_drawn():
    """A new field must be added to FIELDS and `sees`. The next test then fails if `visible` or `relate` omits it."""
    assert FIELDS.keys() == {field.name for field in fields(Mask)}


@settings(deadline=None, max_examples=200)
@given(MASKS, two_tiles())
def test_visible_is_the_definition_and_relate_is_safe(mask, tiles):
    q, k = tiles
    seen = brute_force(mask, q, k)
    np.testing.assert_array_equal(visible(mask, q, k), seen)
    empty, full = relate(mask, bounds(q), bounds(k))
    assert not (empty and seen.any())
    assert not (full and not seen.all())


@settings(deadline=None, max_examples=60)
@given(MASKS, st.sampled_from([(1, 3), (4, 4), (8, 3)]), st.lists(st.integers(0, 9), min_size=8, max_size=12))
def test_relate_is_exact_for_tiles_of_packed_documents(mask, sizes, lengths):
    size_q, size_k = sizes
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, 24])[:24].astype(np.int32)
    row = Tokens(jnp.arange(24, dtype=jnp.int32), jnp.asarray(segments))
    # Bounds of shape [tiles, 1] and [1, tiles]: one call compares all pairs of tiles.
    q = jax.tree.map(lambda x: x[:, None], bounds(jax.tree.map(lambda x: x.reshape(-1, size_q), row)))
    k = jax.tree.map(lambda x: x[None], bounds(jax.tree.map(lambda x: x.reshape(-1, size_k), row)))
    seen = np.asarray(visible(mask, row, row)).reshape(24 // size_q, size_q, 24 // size_k, size_k)
    empty, full = (np.broadcast_to(x, seen.shape[::2]) for x in relate(mask, q, k))
    np.testing.assert_array_equal(empty, ~seen.any((1, 3)))
    np.testing.assert_array_equal(full, seen.all((1, 3)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": -1}, "window=-1 must be an int from 0 to"),
        ({"window": (3, -2)}, r"window=\(3, -2\) must be .* or \(left, right\)"),
        ({"window": ()}, r"window=\(\) must be an int from 0 to"),
        ({"window": (1, 2, 3)}, r"window=\(1, 2, 3\) must be an int from 0 to"),
        ({"window": 2.0}, "window=2.0 must be an int from 0 to"),
        ({"chunk": 0}, "chunk=0 must be an int from 1 to .*; use None for no chunks"),
        ({"chunk": 2.5}, "chunk=2.5 must be an int from 1 to"),
    ],
)
def test_invalid_masks_are_refused(wrong, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Mask(**wrong)


def test_large_windows_and_positions_do_not_overflow():
    far = Tokens(jnp.asarray([[2**31 - 3, 2**31 - 2]], jnp.int32))
    near = Tokens(jnp.asarray([[0, 1]], jnp.int32))
    for tokens in (far, near):
        for mask in (Mask(causal=False, window=2**31 - 2), Mask(causal=False, window=(5, 2**31 - 2))):
            assert np.asarray(visible(mask, tokens, tokens)).all()
            empty, full = relate(mask, bounds(tokens), bounds(tokens))
            assert (bool(empty.all()), bool(full.all())) == (False, True)
    with pytest.raises(ValueError, match="window=2147483648 must be an int from 0 to 2147483646"):
        Mask(window=2**31)


def test_other_int_types_give_an_equal_mask(unchecked):
    scalar: Any = np.int64(5)
    pair: Any = [5, 0]
    assert Mask(window=scalar) == Mask(window=5)
    assert hash(Mask(window=pair)) == hash(Mask(window=(5, 0)))
    assert isinstance(Mask(chunk=scalar).chunk, int)
