"""The kernel alone, on one device, against the dense oracle; and that it leaves out what nothing sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringattn.attention.dense import dense_attention
from ringattn.attention.kernels import Keys, Queries, Rule, Saved, no_gradients, nothing, tiles, xla
from ringattn.attention.mask import Mask, Tokens, visible
from ringattn.attention.softmax import Partial
from ringattn.layout import order

DIMS = 2, 2, 3, 8, 4  # B, G, R, D, Dv


def inputs(length: int, keys_length: int, seed: int = 0, tokens: Tokens | None = None) -> tuple[Queries, Keys, Any]:
    """Queries, keys and d_out; tokens [B, max(length, keys_length)] are the queries' as well as the keys'."""
    B, G, R, D, Dv = DIMS
    rng = np.random.default_rng(seed)
    shapes = (B, G, R, length, D), (B, G, keys_length, D), (B, G, keys_length, Dv), (B, G, R, length, Dv)
    query, key, value, d_out = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    tokens = tokens or Tokens(jnp.arange(max(length, keys_length), dtype=jnp.int32)[None])
    of_queries, of_keys = (jax.tree.map(lambda x, n=n: jnp.asarray(x[:, :n]), tokens) for n in (length, keys_length))
    return Queries(query, of_queries), Keys(key, value, of_keys), d_out


def exact(rule: Rule, queries: Queries, keys: Keys, d_out: Any, slopes: Any) -> list[np.ndarray]:
    """Output and gradients (query, key, value, slopes) of the oracle in float64, in the kernel's order of dims."""
    B, G, R, D, Dv = DIMS
    names = {"positions": "positions", "segments": "segment_ids", "spans": "span_ids"}
    given = {names[name]: x for name, x in queries.tokens._asdict().items() if x is not None}
    rows: dict[str, Any] = {name: jnp.broadcast_to(x, (B, x.shape[1])) for name, x in given.items()}

    def f(query, key, value, slopes):
        query = query.reshape(B, G * R, -1, D).swapaxes(1, 2)
        key, value = (x.swapaxes(1, 2) for x in (key, value))
        slopes = None if slopes is None else slopes.reshape(-1)
        rest: dict[str, Any] = {"mask": rule.mask, "scale": rule.scale, "soft_cap": rule.soft_cap, "slopes": slopes}
        return dense_attention(query, key, value, **rest, **rows).swapaxes(1, 2).reshape(B, G, R, -1, Dv)

    with jax.enable_x64(True):
        floats = [None if x is None else np.asarray(x, np.float64) for x in (queries.query, *keys[:2], slopes)]

        @jax.jit
        def both(floats, d_out):
            out, pull = jax.vjp(f, *floats)
            return out, *pull(d_out)

        return [np.asarray(x) for x in both(floats, np.asarray(d_out, np.float64)) if x is not None]


def found(rule: Rule, queries: Queries, keys: Keys, d_out: Any, slopes: Any) -> list[np.ndarray]:
    def both(queries, keys, d_out, slopes):
        part = xla.forward(rule, queries, keys, slopes, nothing(queries, keys, slopes))
        saved = Saved(part.lse, (d_out.astype(part.out.dtype) * part.out).sum(-1), d_out)
        of_queries, of_keys = xla.backward(rule, queries, keys, slopes, saved, no_gradients(queries, keys, slopes))
        return part.out, of_queries.query, of_keys.key, of_keys.value, of_queries.slopes

    return [np.asarray(x) for x in jax.jit(both)(queries, keys, d_out, slopes) if x is not None]


def assert_close(some: list[np.ndarray], others: list[np.ndarray], forward: float = 2e-6) -> None:
    for number, (a, b) in enumerate(zip(some, others, strict=True)):
        assert np.linalg.norm(a - b) <= (2e-5 if number else forward) * np.linalg.norm(b), number


def packed(length: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(-1, 4, (2, length)), axis=1).astype(np.int32)
    spans = np.sort(rng.integers(-3, 3, (2, length)), axis=1).astype(np.int32)
    return Tokens(np.tile(np.arange(length, dtype=np.int32), (2, 1)), segments, spans)


@pytest.mark.parametrize(("length", "together"), [(1, True), (15, False), (31, True), (48, False), (131, True)])
@pytest.mark.parametrize("rule", [Rule(Mask(), 0.3), Rule(Mask(False, (9, 5), 24), 0.3, soft_cap=2.0)], ids=str)
def test_any_length(length, together, rule, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (16, 8))
    if not together:
        monkeypatch.setattr(tiles, "LOGITS", 1)
    slopes = jnp.asarray(np.random.default_rng(1).uniform(0, 0.2, DIMS[1:3]), jnp.float32)
    case = *inputs(length, length, tokens=packed(length)), slopes
    assert_close(found(rule, *case), exact(rule, *case))


def test_a_prime_length_longer_than_a_tile():
    case = *inputs(1031, 1031, tokens=packed(1031)), None
    rule = Rule(Mask(window=(300, 0)), 0.3)
    assert_close(found(rule, *case), exact(rule, *case))


@pytest.mark.parametrize(("first", "second"), [(slice(0, 20), slice(20, 48)), (slice(17, 48), slice(0, 17))])
def test_what_came_before_is_added_to(first, second, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (16, 16))
    rule, slopes = Rule(Mask(False), 0.3), jnp.full(DIMS[1:3], 0.1)
    queries, keys, d_out = inputs(48, 48)

    def shard(keys: Keys, at: slice) -> Keys:
        return Keys(keys.key[:, :, at], keys.value[:, :, at], jax.tree.map(lambda x: x[:, at], keys.tokens))

    @jax.jit
    def in_two_steps(queries, keys, d_out):
        part = nothing(queries, keys, slopes)
        for at in (first, second):
            part = xla.forward(rule, queries, shard(keys, at), slopes, part)
        saved, gradients = Saved(part.lse, (d_out * part.out).sum(-1), d_out), no_gradients(queries, keys, slopes)
        of_keys = {}
        for at in (first, second):
            gradients, of_keys[at.start] = xla.backward(rule, queries, shard(keys, at), slopes, saved, gradients)
        key, value = (jnp.concatenate([of_keys[start][n] for start in sorted(of_keys)], axis=2) for n in (0, 1))
        return [part.out, gradients.query, key, value, gradients.slopes]

    found = [np.asarray(x) for x in in_two_steps(queries, keys, d_out)]
    assert_close(found, exact(rule, queries, keys, d_out, slopes))


def test_results_of_bfloat16_are_not_rounded_before_they_are_merged():
    queries, keys, d_out = inputs(16, 16)
    queries = queries._replace(query=queries.query.astype(jnp.bfloat16))
    keys = keys._replace(key=keys.key.astype(jnp.bfloat16), value=keys.value.astype(jnp.bfloat16))
    part = jax.jit(lambda q, k: xla.forward(Rule(Mask(), 0.3), q, k, None, nothing(q, k, None)))(queries, keys)
    gradients = found(Rule(Mask(), 0.3), queries, keys, d_out.astype(jnp.bfloat16), None)
    for x in (*part, *gradients):
        assert x.dtype == jnp.float32
        assert (jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32) != x).mean() > 0.5


def test_a_query_that_sees_nothing_leaves_what_came_before():
    queries, keys, _ = inputs(6, 6, tokens=Tokens(np.arange(6, dtype=np.int32)[None], np.full((2, 6), -1, np.int32)))
    out = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 6, 4)), jnp.float32)
    before = Partial(out, out[..., 0])
    for x, y in zip(xla.forward(Rule(Mask(), 1.0), queries, keys, None, before), before, strict=True):
        np.testing.assert_array_equal(x, y)


def visits(mask: Mask, tokens: Tokens, size: int) -> np.ndarray:
    """How often each pair of tiles is visited: [without a mask, with one; rows that go together, tiles, tiles]."""
    length = tokens.positions.shape[1]
    queries, keys, _ = inputs(length, length, tokens=tokens)
    counts = jnp.zeros((2, DIMS[0], length // size, length // size), jnp.int32)

    def trip(at: tiles.Pair, counts, masked: bool):
        assert (at.queries, at.keys) == (size, size)
        return counts.at[int(masked), at.first_row, at.first_query // size, at.first_key // size].add(1)

    return np.asarray(jax.jit(lambda counts: tiles.plan(mask, queries, keys).visit(trip, counts))(counts))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(False), Mask(window=(20, 0)), Mask(False, (5, 12)), Mask(chunk=32)], ids=str
)
@pytest.mark.parametrize("documents", [1, 3, 8])
def test_just_the_pairs_of_tiles_with_something_to_see_are_visited(mask, documents, layout, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (8, 8))
    monkeypatch.setattr(tiles, "LOGITS", 1)
    positions = order(layout, 128, 4)[None]
    segments = np.stack([positions[0] * documents // 128, np.zeros(128, np.int32)]).astype(np.int32)
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(segments))
    seen = np.asarray(visible(mask, tokens, tokens)).reshape(2, 16, 8, 16, 8)
    unmasked, masked = visits(mask, tokens, 8)
    np.testing.assert_array_equal(unmasked, seen.all((2, 4)))
    np.testing.assert_array_equal(masked, seen.any((2, 4)) & ~seen.all((2, 4)))


def test_rows_that_share_a_trip_see_what_either_sees(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (8, 8))
    segments = np.stack([np.arange(64) // 16, np.arange(64) // 32]).astype(np.int32)
    tokens = Tokens(jnp.arange(64, dtype=jnp.int32)[None], jnp.asarray(segments))
    seen = np.asarray(visible(Mask(), tokens, tokens)).reshape(2, 8, 8, 8, 8)
    unmasked, masked = visits(Mask(), tokens, 8)
    np.testing.assert_array_equal(unmasked[0], seen.all((0, 2, 4)))
    np.testing.assert_array_equal((unmasked + masked)[0], seen.any((0, 2, 4)))
    assert not (unmasked + masked)[1].any()


def test_what_is_skipped_is_not_even_read(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (8, 8))
    queries, keys, d_out = inputs(32, 64)
    spoilt = keys._replace(key=keys.key.at[:, :, 32:].set(jnp.nan), value=keys.value.at[:, :, 32:].set(jnp.nan))
    clean = keys._replace(key=keys.key.at[:, :, 32:].set(0.0), value=keys.value.at[:, :, 32:].set(0.0))
    some, others = (found(Rule(Mask(), 0.3), queries, each, d_out, None) for each in (spoilt, clean))
    for a, b in zip(some, others, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("length", "size"), [(1024, 512), (512, 256), (1000, 500), (7, 7), (1, 1), (2 * 521, 1), (81, 81)]
)
def test_a_tile_is_a_part_of_half_the_length(length, size):
    assert tiles.tile_size(length, 512) == size


def test_lengths_without_good_tiles_are_padded(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (512, 512))
    queries, keys, _ = inputs(2 * 521, 512)
    queries, keys = tiles.padded(queries, keys)
    assert queries.query.shape[3] == 1536
    assert keys.key.shape[2] == 512
    assert (np.asarray(queries.tokens.segments)[:, 2 * 521 :] == -1).all()
    assert (np.asarray(keys.tokens.segments) == 0).all()
