"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama's published weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotations(
    positions: Int[Array, "B L"], head_dim: int, theta: float
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """Cosine and sine (float32) of the angle by which each of a head's `head_dim / 2` pairs turns at a position.

    Positions are those inside the token's own document, whatever the order in which the tokens lie.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = jnp.float32(theta) ** -exponents
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B L heads D"], cos: Float[Array, "B L 1 half"], sin: Float[Array, "B L 1 half"]
) -> Float[Array, "B L heads D"]:
    """Turns each pair (x[i], x[i + D/2]) by its angle, in float32; the result is in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
