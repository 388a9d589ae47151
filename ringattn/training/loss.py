"""Weighted cross entropy over a vocabulary, without ever holding the logits of a whole row."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn.mesh import ACTIVATIONS, FSDP, TENSOR, TOKENS

CHUNK = 512
"""Tokens of each local row whose logits exist at a time."""


def cross_entropy(
    hidden: Float[Array, "B L E"],
    output: Float[Array, "V E"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    vocabulary: int,
) -> Float[Array, ""]:
    """The sum over all tokens of weight times -log p(target), in nats and float32.

    `weights` are float32; weights that add up to 1 make the sum a weighted mean. The rest is as of `token_losses`.
    """
    return jnp.sum(weights * token_losses(hidden, output, targets, vocabulary))


def token_losses(
    hidden: Float[Array, "B L E"], output: Float[Array, "V E"], targets: Int[Array, "B L"], vocabulary: int
) -> Float[Array, "B L"]:
    """-log p(target) of every token, in nats and float32, as the tokens lie.

    Args:
      hidden: rows over the data axis, tokens over the context axis, in the compute dtype.
      output: the output projection, V over the tensor axis and E over the FSDP axes, in the compute dtype; rows
        from `vocabulary` on are padding and get no probability.
      targets: int32, each below `vocabulary`.
    """

    @partial(
        jax.shard_map,
        in_specs=(ACTIVATIONS, P(TENSOR, FSDP), TOKENS),
        out_specs=TOKENS,
    )
    def local(hidden, output, targets):
        # float32 here, and back in each chunk: the chunks' gradients of the projection are summed in this dtype.
        output = lax.all_gather(output, FSDP, axis=1, tiled=True).astype(jnp.float32)

        @jax.checkpoint
        def one_position(position):
            return negative_log_likelihood(position[0], output, position[1], vocabulary)

        by_position = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (hidden, targets))
        return jnp.moveaxis(lax.map(one_position, by_position, batch_size=CHUNK), 0, 1)

    return local(hidden, output, targets)


def negative_log_likelihood(
    hidden: Float[Array, "B E"], output: Float[Array, "v E"], targets: Int[Array, " B"], vocabulary: int
) -> Float[Array, " B"]:
    """-log p(target) in nats, inside a shard_map where each device of the tensor axis has v rows of `output`."""
    logits = jnp.einsum("be,ve->bv", hidden, output.astype(hidden.dtype), preferred_element_type=jnp.float32)
    first = lax.axis_index(TENSOR) * output.shape[0]
    ids = first + jnp.arange(output.shape[0], dtype=jnp.int32)
    logits = jnp.where((ids < vocabulary)[None, :], logits, -jnp.inf)
    # Any shift gives the same sum; the largest logit gives no overflow. It takes no part in the gradient.
    shift = lax.pmax(jnp.max(lax.stop_gradient(logits), axis=-1), TENSOR)
    total = lax.psum(jnp.sum(jnp.exp(logits - shift[:, None]), axis=-1), TENSOR)
    wanted = jnp.where(ids[None, :] == targets[:, None], logits, 0.0)
    return jnp.log(total) + shift - lax.psum(jnp.sum(wanted, axis=-1), TENSOR)
