"""Online softmax: merging attention over disjoint sets of keys.

Two values per query summarize attention over a set of keys: the normalized output, and lse, the log of the sum of
exponentials. Partials form a commutative monoid under `merge`, with `init_partial` as identity (Milakov and
Gimelshein, arXiv 1805.02867). A kernel merges by continuing from its `carry`. Ring, gather and ulysses only pass
Partials on. Values are float32, or float64 for float64 inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over some of the keys. A query that sees none of them has out = 0 and lse = -inf."""

    out: Float[Array, "*heads L D"]
    lse: Float[Array, "*heads L"]


def shifted_exp(logits: Array, row_max: Array) -> Array:
    """Returns exp(logits - row_max), and 0 where both are -inf."""
    return jnp.exp(logits - jnp.where(row_max == -jnp.inf, 0.0, row_max))


def normalize(acc: Array, row_sum: Array, row_max: Array) -> Partial:
    """Returns the Partial of an online softmax state.

    Args:
      acc: sum over keys of e^(logit - row_max) * value.
      row_sum: sum over keys of e^(logit - row_max).
      row_max: largest logit so far, per query.
    """
    any_visible = row_sum > 0
    safe_sum = jnp.where(any_visible, row_sum, 1.0)
    lse = jnp.where(any_visible, row_max + jnp.log(safe_sum), -jnp.inf)
    return Partial(acc / safe_sum[..., None], lse)


def merge(a: Partial, b: Partial) -> Partial:
    """Returns attention over the keys of `a` and `b` together; the two sets of keys must be disjoint."""
    row_max = jnp.maximum(a.lse, b.lse)
    weight_a, weight_b = shifted_exp(a.lse, row_max), shifted_exp(b.lse, row_max)
    acc = a.out * weight_a[..., None] + b.out * weight_b[..., None]
    return normalize(acc, weight_a + weight_b, row_max)


def varying_like(x: Array, *others: Array) -> Array:
    """Marks `x` as varying over every mesh axis over which one of `others` varies (inside shard_map).

    The transpose of this pcast is a psum, which sums gradients over the devices.
    """

    def varying(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*map(varying, others)) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
