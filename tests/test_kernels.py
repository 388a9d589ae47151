"""Each kernel on one device against the dense oracle. The kernel for TPUs runs in an interpreter that finds races."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ringattn.attn.kernels import tiles
from ringattn.attn.kernels.pallas_tpu import PallasTpu
from ringattn.attn.kernels.protocol import KV, Kernel, LogitSpec, Queries, QueryGrads, Residuals, init_partial
from ringattn.attn.kernels.xla import Xla
from ringattn.attn.mask import Mask, Runs, Tokens
from ringattn.attn.reference import reference_attention
from ringattn.attn.softmax import Partial

DIMS = 2, 2, 3, 8, 4  # B, G, R, D, Dv


def kernel(name: str, tile: tuple[int, int] = (16, 8)) -> Kernel:
    """Returns the kernel with tiles of at most these numbers of queries and keys."""
    return Xla(tile) if name == "xla" else PallasTpu(tile, multiple=1, interpret=True)


both_kernels = pytest.mark.parametrize("name", ["xla", "pallas"])


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
        names[name]: tuple(jnp.broadcast_to(x, (B, x.shape[1])) for x in (getattr(queries.tokens, name), x))
        for name, x in kv.tokens._asdict().items()
        if name in names and x is not None
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


def run(kernel: Kernel, logit_spec: LogitSpec, queries: Queries, kv: KV, d_out: Any, slopes: Any) -> list[np.ndarray]:
    """Returns the kernel's output and gradients (query, key, value, slopes)."""

    def both(queries, kv, d_out, slopes):
        part = kernel.forward(logit_spec, queries, kv, slopes, None)
        residuals = Residuals(part.lse, (d_out.astype(part.out.dtype) * part.out).sum(-1), d_out, part.out)
        query_grads, kv_grads = kernel.backward(logit_spec, queries, kv, slopes, residuals, None)
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


@contextmanager
def without_races(capfd: pytest.CaptureFixture) -> Iterator[None]:
    """Fails if the interpreter finds that a kernel reads and writes the same memory at once."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


SPECS = [
    LogitSpec(Mask(), 0.3),
    LogitSpec(Mask(False, (9, 5), 24), 0.3, soft_cap=2.0),
    LogitSpec(Mask(False), 0.3),
    LogitSpec(Mask(window=(20, 0)), 0.3),
]


LENGTHS = [(1, True), (15, False), (31, True), (48, False), (131, True)]
CASES = [
    pytest.param("xla", *LENGTHS[n % 5], SPECS[n % 4], marks=[pytest.mark.slow] * (n >= 10))
    for n in range(len(LENGTHS) * len(SPECS))
]
CASES += [("pallas", *length, logit_spec) for length, logit_spec in zip(LENGTHS[:3], SPECS[:3], strict=True)]
# The interpreter takes many seconds for these.
SLOW = [("pallas", *LENGTHS[3], SPECS[3]), ("pallas", *LENGTHS[4], SPECS[1])]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("name", "length", "share_tiles", "logit_spec"), CASES, ids=str)
def test_any_length(name, length, share_tiles, logit_spec, monkeypatch, capfd):
    tile = (32, 48) if name == "pallas" and length > 48 else (16, 8)
    if not share_tiles:  # one batch row per tile
        monkeypatch.setattr(tiles, "MAX_LOGITS", 1)
    slopes = jnp.asarray(np.random.default_rng(1).uniform(0, 0.2, DIMS[1:3]), jnp.float32)
    case = *inputs(length, length, tokens=packed(length)), slopes
    with without_races(capfd):
        assert_close(run(kernel(name, tile), logit_spec, *case), exact(logit_spec, *case))


@pytest.mark.parametrize(
    ("lengths", "step", "mask"),
    [
        ((32, 16), 3, Mask(False)),
        ((24, 16), 3, Mask(window=7)),
        ((32, 24), 1, Mask(False, (0, 9), 20)),
    ],
    ids=str,
)
@both_kernels
def test_implied_positions(name, lengths, step, mask, capfd):
    """Positions that the kernel computes from the first of a tile, without slopes or ids."""
    positions = np.arange(48, dtype=np.int32)[None] * step
    case = *inputs(*lengths, tokens=Tokens(positions, runs=Runs(48, step))), None
    with without_races(capfd):
        assert_close(run(kernel(name), LogitSpec(mask, 0.3), *case), exact(LogitSpec(mask, 0.3), *case))


def test_runs_that_a_tile_crosses_are_not_used():
    """A tile of 16 queries holds two runs of 8 that are far apart."""
    positions = np.arange(32, dtype=np.int32).reshape(4, 8)[[0, 3, 1, 2]].reshape(1, -1)
    case = *inputs(32, 32, tokens=Tokens(positions, runs=Runs(8, 1))), None
    logit_spec = LogitSpec(Mask(window=20), 0.3)
    assert_close(run(kernel("pallas", (16, 16)), logit_spec, *case), exact(logit_spec, *case))


def test_a_prime_length_longer_than_a_tile():
    case = *inputs(1031, 1031, tokens=packed(1031)), None
    logit_spec = LogitSpec(Mask(window=(300, 0)), 0.3)
    assert_close(run(kernel("xla", (256, 128)), logit_spec, *case), exact(logit_spec, *case))


def test_many_heads_in_groups():
    """Six query heads of a K/V head, in grid steps of two."""
    query, key, value, d_out = (
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        for shape in ((1, 1, 6, 16, 8), (1, 1, 16, 8), (1, 1, 16, 8), (1, 1, 6, 16, 8))
    )
    tokens = Tokens(jnp.arange(16, dtype=jnp.int32)[None])
    case = LogitSpec(Mask(), 0.3), Queries(query, tokens), KV(key, value, tokens), d_out, jnp.linspace(0, 0.2, 6)[None]
    grouped = PallasTpu((8, 8), 1, True, heads=2)
    assert_close(run(grouped, *case), [x.astype(np.float64) for x in run(Xla((8, 8)), *case)])


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("xla", slice(0, 20), slice(20, 48)),
        ("xla", slice(17, 48), slice(0, 17)),
        ("pallas", slice(17, 48), slice(0, 17)),
    ],
)
def test_two_shards_with_carry(name, first, second):
    """The kernel adds a second shard to the results over the first."""
    subject = kernel(name, (16, 16))
    logit_spec, slopes = LogitSpec(Mask(False), 0.3), jnp.full(DIMS[1:3], 0.1)
    queries, kv, d_out = inputs(48, 48)

    def shard(kv: KV, at: slice) -> KV:
        return kv.part(at.start, at.stop)

    @jax.jit
    def in_two_steps(queries, kv, d_out):
        part: Partial | None = None
        for at in (first, second):
            part = subject.forward(logit_spec, queries, shard(kv, at), slopes, part)
        assert part is not None
        residuals = Residuals(part.lse, (d_out * part.out).sum(-1), d_out, part.out)
        query_grads: QueryGrads | None = None
        kv_grads = {}
        for at in (first, second):
            query_grads, kv_grads[at.start] = subject.backward(
                logit_spec, queries, shard(kv, at), slopes, residuals, query_grads
            )
        assert query_grads is not None
        key, value = (jnp.concatenate([kv_grads[start][n] for start in sorted(kv_grads)], axis=2) for n in (0, 1))
        return [part.out, query_grads.query, key, value, query_grads.slopes]

    actual = [np.asarray(x) for x in in_two_steps(queries, kv, d_out)]
    assert_close(actual, exact(logit_spec, queries, kv, d_out, slopes))


@both_kernels
def test_bfloat16_results_are_not_rounded(name):
    """Outputs and gradients are float32, so that they can be merged and summed without further rounding."""
    subject, logit_spec = kernel(name), LogitSpec(Mask(), 0.3)
    queries, kv, d_out = inputs(16, 16)
    queries = queries._replace(query=queries.query.astype(jnp.bfloat16))
    kv = kv._replace(key=kv.key.astype(jnp.bfloat16), value=kv.value.astype(jnp.bfloat16))
    part = jax.jit(lambda q, k: subject.forward(logit_spec, q, k, None, init_partial(q, k, None)))(queries, kv)
    gradients = run(subject, logit_spec, queries, kv, d_out.astype(jnp.bfloat16), None)
    for x in (*part, *gradients):
        assert x.dtype == jnp.float32
        assert (jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32) != x).mean() > 0.5


@pytest.mark.parametrize(
    ("window", "padded", "carried"),
    [((11, 0), (0, 1, 0, 1), False), ((11, 0), (0, 1, 0, 1), True), (None, (1, 1, 1, 1), True)],
)
def test_query_gradients_are_rounded_once_all_keys_have_been_seen(window, padded, carried, capfd):
    """Also in tiles of queries that see no key; with (1, 1, 1, 1), no tile of the first row sees one."""
    segments = np.stack([np.repeat(-np.array(padded), 8), np.zeros(32, np.int64)]).astype(np.int32)
    queries, kv, d_out = inputs(32, 32, tokens=Tokens(np.arange(32, dtype=np.int32)[None], segments))
    queries = queries._replace(query=queries.query.astype(jnp.bfloat16))
    kv = kv._replace(key=kv.key.astype(jnp.bfloat16), value=kv.value.astype(jnp.bfloat16))
    subject, logit_spec = kernel("pallas", (8, 8)), LogitSpec(Mask(window=window), 0.3)
    slopes = jnp.full(DIMS[1:3], 0.1)
    numbers = jnp.asarray(np.random.default_rng(1).standard_normal(queries.query.shape), jnp.float32)
    carry = QueryGrads(numbers, jnp.ones_like(slopes)) if carried else None

    @partial(jax.jit, static_argnums=0)
    def backward(dtype, queries, kv, d_out):
        part = subject.forward(logit_spec, queries, kv, slopes, None)
        residuals = Residuals(part.lse, (d_out * part.out).sum(-1), d_out.astype(jnp.bfloat16), part.out)
        return subject.backward(logit_spec, queries, kv, slopes, residuals, carry, dtype)

    with without_races(capfd):
        actual = backward(jnp.bfloat16, queries, kv, d_out)
    query_grads, kv_grads = backward(None, queries, kv, d_out)
    assert query_grads.query.dtype == jnp.float32
    rounded = query_grads._replace(query=query_grads.query.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(actual, (rounded, kv_grads))


@both_kernels
def test_a_query_that_sees_no_key_keeps_the_carry(name):
    queries, kv, _ = inputs(6, 6, tokens=Tokens(np.arange(6, dtype=np.int32)[None], np.full((2, 6), -1, np.int32)))
    out = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 6, 4)), jnp.float32)
    carry = Partial(out, out[..., 0])
    part = jax.jit(kernel(name).forward, static_argnums=0)(LogitSpec(Mask(), 1.0), queries, kv, None, carry)
    chex.assert_trees_all_equal(part, carry)


@pytest.mark.parametrize("padded", [(1, 0, 1, 1), (1, 1, 1, 1)], ids=str)
def test_tiles_of_queries_without_keys_keep_the_carry(padded, capfd):
    """Such tiles at the begin, between others and at the end, in one row of two; the other row has none."""
    segments = np.stack([np.repeat(-np.array(padded), 8), np.zeros(32, np.int64)]).astype(np.int32)
    queries, kv, _ = inputs(32, 32, tokens=Tokens(np.arange(32, dtype=np.int32)[None], segments))
    out = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 32, 4)), jnp.float32)
    carry, logit_spec = Partial(out, out[..., 0]), LogitSpec(Mask(), 0.3)

    def forward(name: str) -> list[np.ndarray]:
        part = jax.jit(kernel(name, (8, 8)).forward, static_argnums=0)(logit_spec, queries, kv, None, carry)
        return [np.asarray(x) for x in part]

    with without_races(capfd):
        actual = forward("pallas")
    hidden = segments[0] < 0
    np.testing.assert_array_equal(actual[0][0][..., hidden, :], np.asarray(out)[0][..., hidden, :])
    for a, b in zip(actual, forward("xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_tiles_of_queries_without_keys_get_a_result_of_their_own(capfd):
    """The first call has no carry to keep, and the last one rounds the carry to the dtype of the output."""
    segments = np.repeat(np.array([[1, -1, 1, -1], [-1] * 4], np.int32), 8, axis=1)
    queries, kv, d_out = inputs(32, 32, tokens=Tokens(np.arange(32, dtype=np.int32)[None], segments))
    earlier = kv._replace(tokens=Tokens(jnp.zeros((1, 32), jnp.int32)))  # seen by all but padding

    def results(name: str) -> tuple[Any, ...]:
        subject, logit_spec = kernel(name, (8, 8)), LogitSpec(Mask(), 0.3)

        @jax.jit
        def calls(queries, kv, earlier, d_out):
            first = subject.forward(logit_spec, queries, kv, None, None)
            carry = subject.forward(logit_spec, queries._replace(tokens=earlier.tokens), earlier, None, None)
            last = subject.forward(logit_spec, queries, kv, None, carry, jnp.bfloat16)
            residuals = Residuals(carry.lse, (d_out * carry.out).sum(-1), d_out, carry.out)
            return first, last, subject.backward(logit_spec, queries, kv, None, residuals, None)

        return calls(queries, kv, earlier, d_out)

    with without_races(capfd):
        actual = results("pallas")
    (first, last, (query_grads, _)), expected = actual, results("xla")
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    hidden = segments < 0
    for row in range(2):
        assert not np.asarray(first.out)[row][..., hidden[row], :].any()
        assert (np.asarray(first.lse)[row][..., hidden[row]] == -np.inf).all()
        assert not np.asarray(query_grads.query)[row][..., hidden[row], :].any()
    assert last.out.dtype == jnp.bfloat16
    last = [x.out.astype(jnp.float32) for x in (last, expected[1])]
    np.testing.assert_allclose(*last, rtol=2**-7, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, ((first, actual[2]), (expected[0], expected[2]))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@both_kernels
def test_hidden_tiles_are_not_read(name):
    queries, kv, d_out = inputs(16, 32)
    with_nan, with_zero = (
        kv._replace(key=kv.key.at[:, :, 16:].set(x), value=kv.value.at[:, :, 16:].set(x)) for x in (jnp.nan, 0.0)
    )
    subject, logit_spec = kernel(name, (8, 8)), LogitSpec(Mask(), 0.3)
    chex.assert_trees_all_equal(*(run(subject, logit_spec, queries, x, d_out, None) for x in (with_nan, with_zero)))


@both_kernels
def test_is_a_kernel(name):
    assert isinstance(kernel(name), Kernel)
    assert kernel(name) == kernel(name)
    hash(kernel(name))
