"""The algebra of partial results: merging is exact, commutative and associative, and never gives NaN."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.attn.kernels.protocol import KV, Queries, init_partial
from ringattn.attn.mask import Tokens
from ringattn.attn.softmax import Partial, merge, normalize, shifted_exp

# No subnormal numbers: XLA on CPU flushes them to 0.
LOGITS = st.one_of(st.just(-np.inf), st.floats(-80, 80, width=32, allow_subnormal=False))
ROWS = st.lists(LOGITS, min_size=6, max_size=6)
VALUES = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def attend_to(logits: list[float], start: int, stop: int, dtype=np.float32) -> Partial:
    """Attention of one query to keys start, ..., stop - 1, by definition in float64."""
    x, value = np.array(logits[start:stop], np.float64), VALUES[start:stop].astype(np.float64)
    peak = x.max(initial=-np.inf)
    if peak == -np.inf:
        return Partial(jnp.zeros((1, 4), dtype), jnp.full((1,), -jnp.inf, dtype))
    weights = np.exp(x - peak)
    out, lse = weights @ value / weights.sum(), peak + np.log(weights.sum())
    return Partial(jnp.asarray(out[None], dtype), jnp.asarray(lse[None], dtype))


def assert_same(a: Partial, b: Partial) -> None:
    np.testing.assert_allclose(a.out, b.out, rtol=0, atol=2e-5)  # rounding an lse of 80 gives an error of 4e-6
    np.testing.assert_allclose(a.lse, b.lse, rtol=2e-6, atol=2e-6)


@settings(deadline=None)
@given(ROWS, st.integers(0, 6))
def test_merge_equals_attention_to_all_keys(logits, cut):
    assert_same(merge(attend_to(logits, 0, cut), attend_to(logits, cut, 6)), attend_to(logits, 0, 6))


@settings(deadline=None)
@given(ROWS)
def test_merge_is_commutative_and_associative(logits):
    a, b, c = (attend_to(logits, start, start + 2) for start in (0, 2, 4))
    chex.assert_trees_all_equal(merge(a, b), merge(b, a))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@settings(deadline=None)
@given(ROWS)
def test_merge_with_no_keys_is_the_identity(logits):
    part, no_keys = attend_to(logits, 0, 6), attend_to(logits, 0, 0)
    for merged in (merge(part, no_keys), merge(no_keys, part)):
        chex.assert_trees_all_equal(merged, part)


@settings(deadline=None)
@given(ROWS, LOGITS)
def test_a_sink_equals_a_key_whose_value_is_zero(logits, sink):
    part = merge(Partial(jnp.zeros((1, 4)), jnp.full((1,), sink, jnp.float32)), attend_to(logits, 0, 6))
    total = np.exp(np.append(np.array(logits, np.float64), sink)).sum()
    np.testing.assert_allclose(part.lse, np.log(total, where=total > 0, out=np.full(1, -np.inf)), rtol=2e-6, atol=2e-6)


def test_each_head_has_its_own_sink():
    tokens = Tokens(jnp.arange(3, dtype=jnp.int32)[None])
    queries = Queries(jnp.zeros((1, 1, 2, 3, 4)), tokens)
    kv = KV(jnp.zeros((1, 1, 3, 4)), jnp.ones((1, 1, 3, 4)), tokens)
    sinks = init_partial(queries, kv, None, jnp.array([[0.0, -jnp.inf]]))
    part = merge(sinks, Partial(jnp.ones((1, 1, 2, 3, 4)), jnp.zeros((1, 1, 2, 3))))
    np.testing.assert_allclose(part.out[0, 0, 0], 0.5)
    np.testing.assert_array_equal(part.out[0, 0, 1], 1.0)


def test_a_query_that_sees_no_key_has_zero_output_and_gradient():
    minus_infinity = jnp.full((1,), -jnp.inf)

    def f(weighted, logit):
        part = merge(normalize(weighted, jnp.zeros(1), minus_infinity), Partial(weighted, logit))
        return part.out.sum(), part.lse

    (out, lse), gradient = jax.value_and_grad(f, has_aux=True)(jnp.zeros((1, 4)), minus_infinity)
    assert out == 0
    assert lse == -jnp.inf
    assert not gradient.any()


def test_shifted_exp_of_minus_infinity_is_zero():
    x = jnp.array([-jnp.inf, 2.0])
    np.testing.assert_array_equal(shifted_exp(x[0], x[0]), 0.0)
    np.testing.assert_array_equal(shifted_exp(x, x[1]), [0.0, 1.0])
