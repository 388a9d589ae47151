"""The algebra that makes a ring exact: softmax over some of the keys, and how two such results join.

Attention over a set of keys is known by two numbers a query: the normalised output and the log of the sum of
exponentials. Results over disjoint sets of keys `merge` in any order (associative, commutative), with `kernels.nothing`
as identity (online softmax: Milakov and Gimelshein, arXiv 1805.02867). Everything is float32, or float64 under x64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over some of the keys; a query that sees none of them has out = 0 and lse = -inf."""

    out: Float[Array, "*heads L D"]
    lse: Float[Array, "*heads L"]


def shifted_exp(logits: Array, peak: Array) -> Array:
    """exp(logits - peak), and 0 where both are -inf."""
    return jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))


def normalise(weighted: Array, total: Array, peak: Array) -> Partial:
    """From sum(e^(logit - peak) * value), sum(e^(logit - peak)) and peak to a Partial."""
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
    return Partial(weighted / safe[..., None], lse)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of `a` and `b` together; the two sets must be disjoint."""
    peak = jnp.maximum(a.lse, b.lse)
    weight_a, weight_b = shifted_exp(a.lse, peak), shifted_exp(b.lse, peak)
    weighted = a.out * weight_a[..., None] + b.out * weight_b[..., None]
    return normalise(weighted, weight_a + weight_b, peak)


def with_sink(part: Partial, sink: Float[Array, "*heads"]) -> Partial:
    """Adds to every query's denominator e^sink: one more key whose value is 0."""
    sinks = jnp.broadcast_to(sink[..., None], part.lse.shape)
    return merge(part, Partial(jnp.zeros_like(part.out), sinks))


def varying_like(x: Array, *others: Array) -> Array:
    """`x`, marked as differing over every mesh axis over which `others` differ (inside shard_map)."""

    def varying(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*map(varying, others)) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
