"""Weighted cross entropy over a vocabulary, without ever holding the logits of a whole row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn.mesh import ACTIVATIONS, FSDP, TENSOR, TOKENS
from ringattn.model import whole

CHUNK = 512
"""Tokens of each local row whose logits exist at a time."""
ROWS = 32_768
"""Most rows of the output projection that a device holds whole at a time."""


def cross_entropy(
    hidden: Float[Array, "B L E"],
    output: Float[Array, "V E"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    vocabulary: int,
) -> Float[Array, ""]:
    """The sum over all tokens of weight times -log p(target), in nats and float32.

    Args:
      hidden, output, targets, vocabulary: as `token_losses` takes them.
      weights: float32; weights that add up to 1 make the sum a weighted mean.
    """
    return jnp.sum(weights * token_losses(hidden, output, targets, vocabulary))


def token_losses(
    hidden: Float[Array, "B L E"], output: Float[Array, "V E"], targets: Int[Array, "B L"], vocabulary: int
) -> Float[Array, "B L"]:
    """-log p(target) of every token, in nats and float32.

    Args:
      hidden: rows over the data axis, tokens over the context axes, in the compute dtype.
      output: the output projection, float32, V over the tensor axis and E over the FSDP axes; rows from `vocabulary`
        on are padding and get no probability.
      targets: int32, each below `vocabulary`.
    """
    return _by_token(hidden, output, targets, vocabulary, best=False)[0]


def token_scores(
    hidden: Float[Array, "B L E"], output: Float[Array, "V E"], targets: Int[Array, "B L"], vocabulary: int
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """`token_losses`, and the most likely id instead of each target (int32; of equally likely ones the lowest)."""
    losses, best = _by_token(hidden, output, targets, vocabulary, best=True)
    return losses, best


def _by_token(hidden: Array, output: Array, targets: Array, vocabulary: int, best: bool) -> tuple[Array, ...]:
    """Losses [B, L] and, with `best`, the most likely ids [B, L]."""
    specs = (ACTIVATIONS, P(TENSOR, FSDP), TOKENS)

    @partial(jax.shard_map, in_specs=specs, out_specs=(TOKENS,) * (1 + best))
    def local(hidden, output, targets):
        first = lax.axis_index(TENSOR) * output.shape[0]
        slices = next(n for n in range(-(-output.shape[0] // ROWS), output.shape[0] + 1) if output.shape[0] % n == 0)
        by_slice = output.reshape(slices, -1, output.shape[1])
        by_position = jnp.moveaxis(hidden, 1, 0).astype(jnp.float32), targets.T

        @jax.checkpoint
        def one_slice(numbered: Any) -> Any:
            number, piece = numbered
            # float32 here as hidden above, and back in each chunk: their gradients are summed in this dtype.
            rows = whole(piece, hidden.dtype, 1).astype(jnp.float32)
            ids = first + number * piece.shape[0] + jnp.arange(piece.shape[0], dtype=jnp.int32)

            @jax.checkpoint
            def one_position(position: Any) -> Any:
                token, target = position
                logits = _logits(token.astype(hidden.dtype), rows.astype(hidden.dtype), ids, vocabulary)
                likeliest = (ids[jnp.argmax(logits, axis=-1)],) if best else ()
                return *_sums(logits, ids, target), *likeliest

            return lax.map(one_position, by_position, batch_size=CHUNK)

        numbered = jnp.arange(slices, dtype=jnp.int32), by_slice
        shifts, totals, wanted, *likeliest = lax.map(one_slice, numbered)
        shift = lax.pmax(jnp.max(shifts, axis=0), TENSOR)
        total = lax.psum(jnp.sum(totals * jnp.exp(shifts - shift[None]), axis=0), TENSOR)
        losses = jnp.log(total) + shift - lax.psum(jnp.sum(wanted, axis=0), TENSOR)
        # The lowest of those ids whose logit is the largest of all.
        none = jnp.iinfo(jnp.int32).max
        ids = [lax.pmin(jnp.min(jnp.where(shifts == shift[None], each, none), 0), TENSOR) for each in likeliest]
        return tuple(each.T for each in (losses, *ids))

    # The whole projection, and its gradient, are not to be held while the layers compute.
    hidden, output = lax.optimization_barrier((hidden, output))
    return local(hidden, output, targets)


def _logits(
    hidden: Float[Array, "B E"], rows: Float[Array, "v E"], ids: Int[Array, " v"], vocabulary: int
) -> Float[Array, "B v"]:
    logits = jnp.einsum("be,ve->bv", hidden, rows, preferred_element_type=jnp.float32)
    return jnp.where((ids < vocabulary)[None, :], logits, -jnp.inf)


def _sums(
    logits: Float[Array, "B v"], ids: Int[Array, " v"], targets: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Of these logits: the largest, the sum of exp(logit - largest), and the target's.

    The last is 0 where the target lies elsewhere; the first the least of numbers where all rows are padding.

    Any shift gives the same loss; the largest logit gives no overflow. It takes no part in the gradient.
    """
    shift = jnp.max(lax.stop_gradient(logits), axis=-1)
    shift = jnp.where(jnp.isfinite(shift), shift, jnp.finfo(jnp.float32).min)
    wanted = jnp.where(ids[None, :] == targets[:, None], logits, 0.0)
    return shift, jnp.sum(jnp.exp(logits - shift[:, None]), axis=-1), jnp.sum(wanted, axis=-1)
