import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.attention.softmax import Partial, merge, normalise, shifted_exp, with_sink

# Compilers for processors round numbers below 1e-38 to 0.
LOGITS = st.one_of(st.just(-np.inf), st.floats(-80, 80, width=32, allow_subnormal=False))
ROWS = st.lists(LOGITS, min_size=6, max_size=6)
VALUES = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def of_keys(logits: list[float], start: int, stop: int, dtype=np.float32) -> Partial:
    """Attention of one query to keys start...stop, straight from the definition, in float64."""
    x, value = np.array(logits[start:stop], np.float64), VALUES[start:stop].astype(np.float64)
    peak = x.max(initial=-np.inf)
    if peak == -np.inf:
        return Partial(jnp.zeros((1, 4), dtype), jnp.full((1,), -jnp.inf, dtype))
    weights = np.exp(x - peak)
    out, lse = weights @ value / weights.sum(), peak + np.log(weights.sum())
    return Partial(jnp.asarray(out[None], dtype), jnp.asarray(lse[None], dtype))


def assert_same(a: Partial, b: Partial) -> None:
    np.testing.assert_allclose(a.out, b.out, rtol=0, atol=2e-5)  # a rounded lse of 80 is off by 4e-6
    np.testing.assert_allclose(a.lse, b.lse, rtol=2e-6, atol=2e-6)


@settings(deadline=None)
@given(ROWS, st.integers(0, 6))
def test_merging_two_parts_is_attention_to_both(logits, cut):
    assert_same(merge(of_keys(logits, 0, cut), of_keys(logits, cut, 6)), of_keys(logits, 0, 6))


@settings(deadline=None)
@given(ROWS)
def test_merge_is_commutative_and_associative(logits):
    a, b, c = (of_keys(logits, start, start + 2) for start in (0, 2, 4))
    for x, y in zip(merge(a, b), merge(b, a), strict=True):
        np.testing.assert_array_equal(x, y)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@settings(deadline=None)
@given(ROWS)
def test_nothing_is_the_identity(logits):
    part, nothing = of_keys(logits, 0, 6), of_keys(logits, 0, 0)
    for merged in (merge(part, nothing), merge(nothing, part)):
        for x, y in zip(merged, part, strict=True):
            np.testing.assert_array_equal(x, y)


@settings(deadline=None)
@given(ROWS, LOGITS)
def test_a_sink_is_one_more_key_whose_value_is_zero(logits, sink):
    part = with_sink(of_keys(logits, 0, 6), jnp.full((), sink, jnp.float32))
    assert_same(part, merge(of_keys(logits, 0, 6), Partial(jnp.zeros((1, 4)), jnp.full((1,), sink, jnp.float32))))
    total = np.exp(np.append(np.array(logits, np.float64), sink)).sum()
    np.testing.assert_allclose(part.lse, np.log(total, where=total > 0, out=np.full(1, -np.inf)), rtol=2e-6, atol=2e-6)


def test_a_sink_is_of_its_own_head():
    part = Partial(jnp.ones((2, 3, 4)), jnp.zeros((2, 3)))
    with_both = with_sink(part, jnp.array([0.0, -jnp.inf]))
    np.testing.assert_allclose(with_both.out[0], 0.5)
    np.testing.assert_array_equal(with_both.out[1], 1.0)


def test_a_query_that_sees_nothing_gives_zero_and_a_zero_gradient():
    nothing = jnp.full((1,), -jnp.inf)

    def f(weighted, logit):
        part = merge(normalise(weighted, jnp.zeros(1), nothing), Partial(weighted, logit))
        return part.out.sum(), part.lse

    (out, lse), gradient = jax.value_and_grad(f, has_aux=True)(jnp.zeros((1, 4)), nothing)
    assert out == 0
    assert lse == -jnp.inf
    assert not gradient.any()


def test_shifted_exp_of_nothing_is_zero():
    x = jnp.array([-jnp.inf, 2.0])
    np.testing.assert_array_equal(shifted_exp(x[0], x[0]), 0.0)
    np.testing.assert_array_equal(shifted_exp(x, x[1]), [0.0, 1.0])
