"""The XLA kernel on one device against the dense oracle, and the tiles that it visits."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringattn.attn.kernels import tiles, xla
from ringattn.attn.kernels.protocol import KV, Kernel, LogitSpec, Queries, Residuals, init_partial, init_query_grads
from ringattn.attn.mask import Mask, Tokens, visible
from ringattn.attn.reference import reference_attention
from ringattn.attn.softmax import Partial
from ringattn.layout import order

DIMS = 2, 2, 3, 8, 4  # B, G, R, D, Dv


def inputs(length: int, kv_length: int, seed: int = 0, tokens: Tokens | None = None) -> tuple[Queries, KV, Any]:
    """Draws queries, K/V and d_out. Both take their tokens from the start of `tokens`, [B, max of both lengths]."""
    B, G, R, D, Dv = DIMS
    rng = np.random.default_rng(seed)
    shapes = (B, G, R, length, D), (B, G, kv_length, D), (B, G, kv_length, Dv), (B, G, R, length, Dv)
    query, key, value, d_out = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    tokens = tokens or Tokens(jnp.arange(max(length, kv_length), dtype=jnp.int32)[None])
    q_tokens, kv_tokens = (jax.tree.map(lambda x, n=n: jnp.asarray(x[:, :n]), tokens) for n in (length, kv_length))
    return Queries(query, q_tokens), KV(key, value, kv_tokens), d_out


def exact(logit_spec: LogitSpec, queries: Queries, kv: KV, d_out: Any, slopes: Any) -> list[np.ndarray]:
    """Returns the float64 oracle's output and gradients (query, key, value, slopes), in the kernel's dims."""
    B, G, R, D, Dv = DIMS
    names = {"positions": "positions", "segments": "segment_ids", "spans": "span_ids"}
    ids: dict[str, Any] = {
        names[name]: jnp.broadcast_to(x, (B, x.shape[1]))
        for name, x in queries.tokens._asdict().items()
        if x is not None
    }

    def f(query, key, value, slopes):
        query = query.reshape(B, G * R, -1, D).swapaxes(1, 2)
        key, value = (x.swapaxes(1, 2) for x in (key, value))
        slopes = None if slopes is None else slopes.reshape(-1)
        options: dict[str, Any] = vars(logit_spec) | {"slopes": slopes}
        return reference_attention(query, key, value, **options, **ids).swapaxes(1, 2).reshape(B, G, R, -1, Dv)

    with jax.enable_x64(True):
        floats = [None if x is None else np.asarray(x, np.float64) for x in (queries.query, kv.key, kv.value, slopes)]

        @jax.jit
        def both(floats, d_out):
            out, pull = jax.vjp(f, *floats)
            return out, *pull(d_out)

        return [np.asarray(x) for x in both(floats, np.asarray(d_out, np.float64)) if x is not None]


def run(logit_spec: LogitSpec, queries: Queries, kv: KV, d_out: Any, slopes: Any) -> list[np.ndarray]:
    """Returns the kernel's output and gradients (query, key, value, slopes)."""

    def both(queries, kv, d_out, slopes):
        part = xla.forward(logit_spec, queries, kv, slopes, init_partial(queries, kv, slopes))
        residuals = Residuals(part.lse, (d_out.astype(part.out.dtype) * part.out).sum(-1), d_out)
        carry = init_query_grads(queries, kv, slopes)
        query_grads, kv_grads = xla.backward(logit_spec, queries, kv, slopes, residuals, carry)
        return part.out, query_grads.query, kv_grads.key, kv_grads.value, query_grads.slopes

    return [np.asarray(x) for x in jax.jit(both)(queries, kv, d_out, slopes) if x is not None]


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Compares an output within 2e-6 and the gradients that follow it within 2e-5, relative norm."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert np.linalg.norm(a - b) <= (2e-5 if number else 2e-6) * np.linalg.norm(b), number


def packed(length: int, seed: int = 0) -> Tokens:
    """Draws packed documents with padding, and spans."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(-1, 4, (2, length)), axis=1).astype(np.int32)
    spans = np.sort(rng.integers(-3, 3, (2, length)), axis=1).astype(np.int32)
    return Tokens(np.tile(np.arange(length, dtype=np.int32), (2, 1)), segments, spans)


@pytest.mark.parametrize(("length", "share_tiles"), [(1, True), (15, False), (31, True), (48, False), (131, True)])
@pytest.mark.parametrize(
    "logit_spec", [LogitSpec(Mask(), 0.3), LogitSpec(Mask(False, (9, 5), 24), 0.3, soft_cap=2.0)], ids=str
)
def test_any_length(length, share_tiles, logit_spec, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (16, 8))
    if not share_tiles:  # one batch row per tile
        monkeypatch.setattr(tiles, "MAX_LOGITS", 1)
    slopes = jnp.asarray(np.random.default_rng(1).uniform(0, 0.2, DIMS[1:3]), jnp.float32)
    case = *inputs(length, length, tokens=packed(length)), slopes
    assert_close(run(logit_spec, *case), exact(logit_spec, *case))


def test_a_prime_length_longer_than_a_tile():
    case = *inputs(1031, 1031, tokens=packed(1031)), None
    logit_spec = LogitSpec(Mask(window=(300, 0)), 0.3)
    assert_close(run(logit_spec, *case), exact(logit_spec, *case))


@pytest.mark.parametrize(("first", "second"), [(slice(0, 20), slice(20, 48)), (slice(17, 48), slice(0, 17))])
def test_two_shards_with_carry(first, second, monkeypatch):
    """The kernel adds a second shard to the results over the first."""
    monkeypatch.setattr(tiles, "TILE", (16, 16))
    logit_spec, slopes = LogitSpec(Mask(False), 0.3), jnp.full(DIMS[1:3], 0.1)
    queries, kv, d_out = inputs(48, 48)

    def shard(kv: KV, at: slice) -> KV:
        return KV(kv.key[:, :, at], kv.value[:, :, at], jax.tree.map(lambda x: x[:, at], kv.tokens))

    @jax.jit
    def in_two_steps(queries, kv, d_out):
        part = init_partial(queries, kv, slopes)
        for at in (first, second):
            part = xla.forward(logit_spec, queries, shard(kv, at), slopes, part)
        residuals = Residuals(part.lse, (d_out * part.out).sum(-1), d_out)
        query_grads, kv_grads = init_query_grads(queries, kv, slopes), {}
        for at in (first, second):
            query_grads, kv_grads[at.start] = xla.backward(
                logit_spec, queries, shard(kv, at), slopes, residuals, query_grads
            )
        key, value = (jnp.concatenate([kv_grads[start][n] for start in sorted(kv_grads)], axis=2) for n in (0, 1))
        return [part.out, query_grads.query, key, value, query_grads.slopes]

    actual = [np.asarray(x) for x in in_two_steps(queries, kv, d_out)]
    assert_close(actual, exact(logit_spec, queries, kv, d_out, slopes))


def test_bfloat16_results_are_not_rounded():
    """Outputs and gradients are float32, so that they can be merged and summed without further rounding."""
    logit_spec = LogitSpec(Mask(), 0.3)
    queries, kv, d_out = inputs(16, 16)
    queries = queries._replace(query=queries.query.astype(jnp.bfloat16))
    kv = kv._replace(key=kv.key.astype(jnp.bfloat16), value=kv.value.astype(jnp.bfloat16))
    part = jax.jit(lambda q, k: xla.forward(logit_spec, q, k, None, init_partial(q, k, None)))(queries, kv)
    gradients = run(logit_spec, queries, kv, d_out.astype(jnp.bfloat16), None)
    for x in (*part, *gradients):
        assert x.dtype == jnp.float32
        assert (jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32) != x).mean() > 0.5


def test_a_query_that_sees_no_key_keeps_the_carry():
    queries, kv, _ = inputs(6, 6, tokens=Tokens(np.arange(6, dtype=np.int32)[None], np.full((2, 6), -1, np.int32)))
    out = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 6, 4)), jnp.float32)
    carry = Partial(out, out[..., 0])
    chex.assert_trees_all_equal(xla.forward(LogitSpec(Mask(), 1.0), queries, kv, None, carry), carry)


def test_the_module_is_a_kernel():
    assert isinstance(xla, Kernel)


def visits(mask: Mask, tokens: Tokens, size: int) -> np.ndarray:
    """Counts the visits of each pair of tiles: [unmasked or masked, row tiles, query tiles, key tiles]."""
    length = tokens.positions.shape[1]
    queries, kv, _ = inputs(length, length, tokens=tokens)
    counts = jnp.zeros((2, DIMS[0], length // size, length // size), jnp.int32)

    def step(pair: tiles.TilePair, counts, masked: bool):
        assert (pair.queries, pair.keys) == (size, size)
        return counts.at[int(masked), pair.first_row, pair.first_query // size, pair.first_key // size].add(1)

    return np.asarray(jax.jit(lambda counts: tiles.plan_tiles(mask, queries, kv).visit(step, counts))(counts))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(False), Mask(window=(20, 0)), Mask(False, (5, 12)), Mask(chunk=32)], ids=str
)
@pytest.mark.parametrize("documents", [1, 3, 8])
def test_only_pairs_of_tiles_with_a_visible_key_are_visited(mask, documents, layout, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (8, 8))
    monkeypatch.setattr(tiles, "MAX_LOGITS", 1)
    positions = order(layout, 128, 4)[None]
    segments = np.stack([positions[0] * documents // 128, np.zeros(128, np.int32)]).astype(np.int32)
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(segments))
    seen = np.asarray(visible(mask, tokens, tokens)).reshape(2, 16, 8, 16, 8)
    unmasked, masked = visits(mask, tokens, 8)
    np.testing.assert_array_equal(unmasked, seen.all((2, 4)))
    np.testing.assert_array_equal(masked, seen.any((2, 4)) & ~seen.all((2, 4)))


def test_rows_in_one_tile_visit_what_either_sees(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (8, 8))
    segments = np.stack([np.arange(64) // 16, np.arange(64) // 32]).astype(np.int32)
    tokens = Tokens(jnp.arange(64, dtype=jnp.int32)[None], jnp.asarray(segments))
    seen = np.asarray(visible(Mask(), tokens, tokens)).reshape(2, 8, 8, 8, 8)
    unmasked, masked = visits(Mask(), tokens, 8)
    np.testing.assert_array_equal(unmasked[0], seen.all((0, 2, 4)))
    np.testing.assert_array_equal((unmasked + masked)[0], seen.any((0, 2, 4)))
    assert not (unmasked + masked)[1].any()


def test_skipped_tiles_are_not_read(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (8, 8))
    queries, kv, d_out = inputs(32, 64)
    with_nan, with_zero = (
        kv._replace(key=kv.key.at[:, :, 32:].set(x), value=kv.value.at[:, :, 32:].set(x)) for x in (jnp.nan, 0.0)
    )
    logit_spec = LogitSpec(Mask(), 0.3)
    chex.assert_trees_all_equal(*(run(logit_spec, queries, x, d_out, None) for x in (with_nan, with_zero)))


@pytest.mark.parametrize(
    ("length", "size"), [(1024, 512), (512, 256), (1000, 500), (7, 7), (1, 1), (2 * 521, 1), (81, 81)]
)
def test_tile_size_divides_half_the_length(length, size):
    assert tiles.tile_size(length, 512) == size


def test_lengths_without_good_tiles_are_padded(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", (512, 512))
    queries, kv, _ = inputs(2 * 521, 512)
    queries, kv = tiles.pad_to_tiles(queries, kv)
    assert queries.query.shape[3] == 1536
    assert kv.key.shape[2] == 512
    assert (np.asarray(queries.tokens.segments)[:, 2 * 521 :] == -1).all()
    assert (np.asarray(kv.tokens.segments) == 0).all()
