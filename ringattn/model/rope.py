"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama's published weights.

A model meets longer rows than it was trained on by turning slower. How much slower each pair turns is what the
scalings differ in: linear interpolation (arXiv 2306.15595), NTK-aware (a larger theta, so that fast pairs keep their
pace and the slowest turns `factor` times slower), YaRN (arXiv 2309.00071) and Llama 3.1's.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from ringattn import config

# YaRN and Llama 3.1 ask how often a pair turns within the `rope_original` tokens that the model knows: from the second
# number on it keeps its pace, up to the first it turns `factor` times slower, and in between lies a mixture.
YARN_TURNS = (1.0, 32.0)
LLAMA3_TURNS = (1.0, 4.0)


def frequencies(c: config.Model) -> Float64[np.ndarray, " half"]:
    """Radians per position by which each of a head's `head_dim / 2` pairs turns."""
    half = c.head_dim // 2
    pair = np.arange(half)
    theta = c.rope_theta
    if c.rope_scaling == "ntk" and half > 1:
        theta *= c.rope_factor ** (half / (half - 1))
    usual = theta ** (-pair / half)
    if c.rope_scaling in ("none", "ntk"):
        return usual
    if c.rope_scaling == "linear":
        return usual / c.rope_factor
    if c.rope_scaling == "llama3":  # mixed in a line over the turns
        turns = c.rope_original * usual / (2 * math.pi)
        kept = np.clip((turns - LLAMA3_TURNS[0]) / (LLAMA3_TURNS[1] - LLAMA3_TURNS[0]), 0, 1)
    else:  # yarn: in a line over the pairs, between those that turn so often
        last, first = (half * math.log(c.rope_original / (2 * math.pi * n)) / math.log(theta) for n in YARN_TURNS)
        first, last = max(math.floor(first), 0), min(math.ceil(last), c.head_dim - 1)
        kept = 1 - np.clip((pair - first) / max(last - first, 0.001), 0, 1)
    return usual * kept + usual / c.rope_factor * (1 - kept)


def rotations(
    positions: Int[Array, "B L"], c: config.Model
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """Cosine and sine (float32) of the angle by which each pair turns at a position, times YaRN's temperature.

    Positions are those inside the token's own document, whatever the order in which the tokens lie.

    A float32 product of position and frequency would be off by 0.4 radians at ten million tokens. Turns, though, count
    modulo 1: in units of 2**-32 turn their integer product may overflow, and what the unit rounds off is added after.
    """
    turns = frequencies(c) / (2 * math.pi)
    units = np.round(turns * 2**32)
    rest = (turns - units / 2**32).astype(np.float32)
    at = positions[:, :, None, None]
    whole = at * jnp.asarray(units.astype(np.uint32).view(np.int32))[None, None, None]
    angles = 2 * math.pi * (whole.astype(jnp.float32) * 2.0**-32 + at.astype(jnp.float32) * rest[None, None, None])
    scale = 0.1 * math.log(c.rope_factor) + 1 if c.rope_scaling == "yarn" else 1.0
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def rotate(
    x: Float[Array, "B L heads D"], cos: Float[Array, "B L 1 half"], sin: Float[Array, "B L 1 half"]
) -> Float[Array, "B L heads D"]:
    """Turns each pair (x[i], x[i + D/2]) by its angle, in float32; the result is in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
