"""Cross entropy over the vocabulary, without materializing the logits of a whole sequence."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn.attn.kernels.protocol import matmul_precision
from ringattn.mesh.axes import ACTIVATIONS, FSDP, TENSOR, TOKENS
from ringattn.model.parallel import all_gather_param, soft_capped

CHUNK = 512
"""Number of tokens of each local sequence whose logits are computed at a time."""
MAX_ROWS = 32_768
"""Maximum number of rows of the output projection that a device gathers at a time."""


def cross_entropy(
    hidden: Float[Array, "B L E"],
    output: Float[Array, "V E"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    vocabulary: int,
    soft_cap: float | None = None,
) -> Float[Array, ""]:
    """Returns the sum over all tokens of weight * -log p(target), in nats and float32.

    Args:
      hidden, output, targets, vocabulary, soft_cap: see `token_losses`.
      weights: float32. If they sum to 1, the result is a weighted mean.
    """
    return jnp.sum(weights * token_losses(hidden, output, targets, vocabulary, soft_cap))


def token_losses(
    hidden: Float[Array, "B L E"],
    output: Float[Array, "V E"],
    targets: Int[Array, "B L"],
    vocabulary: int,
    soft_cap: float | None = None,
) -> Float[Array, "B L"]:
    """Returns -log p(target) per token, in nats and float32.

    Args:
      hidden: in the compute dtype, sharded as activations.
      output: the output projection, float32, V sharded over the tensor axis and E over the FSDP axes. Rows
        >= `vocabulary` are padding and have probability 0.
      targets: int32, less than `vocabulary`.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap). None: no cap.
    """
    return _per_token(hidden, output, targets, vocabulary, soft_cap, predict=False)[0]


def token_scores(
    hidden: Float[Array, "B L E"],
    output: Float[Array, "V E"],
    targets: Int[Array, "B L"],
    vocabulary: int,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """Returns `token_losses`, and the argmax id per token (int32; the lowest id on ties)."""
    losses, predictions = _per_token(hidden, output, targets, vocabulary, soft_cap, predict=True)
    return losses, predictions


def _per_token(
    hidden: Array, output: Array, targets: Array, vocabulary: int, soft_cap: float | None, predict: bool
) -> tuple[Array, ...]:
    """Returns losses [B, L] and, with `predict`, argmax ids [B, L]."""
    specs = (ACTIVATIONS, P(TENSOR, FSDP), TOKENS)

    @partial(jax.shard_map, in_specs=specs, out_specs=(TOKENS,) * (1 + predict))
    def local(hidden, output, targets):
        first_id = lax.axis_index(TENSOR) * output.shape[0]
        slices = next(
            n for n in range(-(-output.shape[0] // MAX_ROWS), output.shape[0] + 1) if output.shape[0] % n == 0
        )
        by_slice = output.reshape(slices, -1, output.shape[1])
        by_position = jnp.moveaxis(hidden, 1, 0).astype(jnp.float32), targets.T

        @jax.checkpoint
        def one_slice(indexed: tuple[Array, Array]) -> tuple[Array, ...]:
            index, shard = indexed
            # Keep float32 and cast inside each chunk, so that chunk gradients accumulate in float32.
            rows = all_gather_param(shard, hidden.dtype, 1).astype(jnp.float32)
            ids = first_id + index * shard.shape[0] + jnp.arange(shard.shape[0], dtype=jnp.int32)

            @jax.checkpoint
            def one_position(position: tuple[Array, Array]) -> tuple[Array, ...]:
                token, target = position
                logits = soft_capped(_products(token.astype(hidden.dtype), rows.astype(hidden.dtype)), soft_cap)
                logits = jnp.where((ids < vocabulary)[None, :], logits, -jnp.inf)
                predictions = (ids[jnp.argmax(logits, axis=-1)],) if predict else ()
                return *_softmax_terms(logits, ids, target), *predictions

            return lax.map(one_position, by_position, batch_size=CHUNK)

        indexed = jnp.arange(slices, dtype=jnp.int32), by_slice
        shifts, totals, target_logits, *predictions = lax.map(one_slice, indexed)
        shift = lax.pmax(jnp.max(shifts, axis=0), TENSOR)
        total = lax.psum(jnp.sum(totals * jnp.exp(shifts - shift[None]), axis=0), TENSOR)
        losses = jnp.log(total) + shift - lax.psum(jnp.sum(target_logits, axis=0), TENSOR)
        # The lowest id with the largest logit, over all slices and devices.
        no_id = jnp.iinfo(jnp.int32).max
        ids = [lax.pmin(jnp.min(jnp.where(shifts == shift[None], x, no_id), 0), TENSOR) for x in predictions]
        return tuple(x.T for x in (losses, *ids))

    # Without this barrier XLA keeps the gathered projection, or its gradient, alive while the layers compute.
    hidden, output = lax.optimization_barrier((hidden, output))
    return local(hidden, output, targets)


def _products(hidden: Float[Array, "B E"], rows: Float[Array, "v E"]) -> Float[Array, "B v"]:
    options = {"precision": matmul_precision(hidden.dtype), "preferred_element_type": jnp.float32}
    return jnp.einsum("be,ve->bv", hidden, rows, **options)


def _softmax_terms(
    logits: Float[Array, "B v"], ids: Int[Array, " v"], targets: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Returns the largest logit (shift), the sum of exp(logit - shift), and the target's logit.

    The target's logit is 0 if `ids` does not contain the target. The shift is the lowest finite float32 if all rows are
    padding. The loss does not depend on the shift, so it needs no gradient; the largest logit avoids overflow.
    """
    shift = jnp.max(lax.stop_gradient(logits), axis=-1)
    shift = jnp.where(jnp.isfinite(shift), shift, jnp.finfo(jnp.float32).min)
    target_logits = jnp.where(ids[None, :] == targets[:, None], logits, 0.0)
    return shift, jnp.sum(jnp.exp(logits - shift[:, None]), axis=-1), jnp.sum(target_logits, axis=-1)
