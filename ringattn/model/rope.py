"""Rotary position embedding (RoPE, arXiv 2104.09864), in the half-split form of Hugging Face's Llama.

Scaling methods lower the frequencies for contexts beyond the training length: linear (position interpolation, arXiv
2306.15595), NTK-aware (a larger theta, which keeps the highest frequency and divides the lowest by `rope_factor`), YaRN
(arXiv 2309.00071) and the method of Llama 3.1.
"""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from ringattn import config

# (low, high): dimension pairs with at least `high` rotations within the training length (`rope_original`) keep their
# frequency, pairs with at most `low` rotations divide it by `rope_factor`, and pairs in between interpolate.
YARN_TURNS = (1.0, 32.0)
LLAMA3_TURNS = (1.0, 4.0)


def local_rope(c: config.Model) -> config.Model:
    """Returns `c` with the RoPE of its window layers: base `rope_local_theta` without scaling, if it is set."""
    if c.rope_local_theta is None:
        return c
    return replace(c, rope_theta=c.rope_local_theta, rope_local_theta=None, rope_scaling="none", rope_factor=1.0)


def scaled_base(c: config.Model) -> float:
    """Returns the RoPE base: `rope_theta`, with NTK-aware scaling a larger one."""
    half = c.head_dim // 2
    return c.rope_theta * (c.rope_factor ** (half / (half - 1)) if c.rope_scaling == "ntk" and half > 1 else 1.0)


def yarn_attention_factor(factor: float) -> float:
    """Returns the factor by which YaRN multiplies cosine and sine, which scales the attention logits by its square."""
    return 0.1 * math.log(factor) + 1


def frequencies(c: config.Model) -> Float64[np.ndarray, " half"]:
    """Returns the frequencies of the `head_dim / 2` dimension pairs of a head, in radians per position."""
    half = c.head_dim // 2
    pair = np.arange(half)
    theta = scaled_base(c)
    unscaled = theta ** (-pair / half)
    if c.rope_scaling in ("none", "ntk"):
        return unscaled
    if c.rope_scaling == "linear":
        return unscaled / c.rope_factor
    if c.rope_scaling == "llama3":  # interpolates linearly in the number of rotations
        turns = c.rope_original * unscaled / (2 * math.pi)
        unscaled_weight = np.clip((turns - LLAMA3_TURNS[0]) / (LLAMA3_TURNS[1] - LLAMA3_TURNS[0]), 0, 1)
    else:  # yarn: interpolates linearly in the index of the pair
        last, first = (half * math.log(c.rope_original / (2 * math.pi * n)) / math.log(theta) for n in YARN_TURNS)
        first, last = max(math.floor(first), 0), min(math.ceil(last), c.head_dim - 1)
        unscaled_weight = 1 - np.clip((pair - first) / max(last - first, 0.001), 0, 1)
    return unscaled * unscaled_weight + unscaled / c.rope_factor * (1 - unscaled_weight)


def rotations(
    positions: Int[Array, "B L"], c: config.Model
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """Returns cosine and sine (float32) of each pair's angle at each position, times YaRN's attention factor.

    `positions` are counted from the start of each segment; tokens may be in any order.

    A float32 product of position and frequency would be off by 0.4 radians at ten million tokens. Angles
    matter only modulo one turn. Each frequency is therefore split into a multiple of 2**-32 turns, whose int32 product
    with the position wraps around at full turns, and a remainder, whose float32 product is small.
    """
    turns = frequencies(c) / (2 * math.pi)
    units = np.round(turns * 2**32)
    remainders = (turns - units / 2**32).astype(np.float32)
    positions = positions[:, :, None, None]
    wrapped = positions * jnp.asarray(units.astype(np.uint32).view(np.int32))[None, None, None]
    turns_modulo_1 = wrapped.astype(jnp.float32) * 2.0**-32
    angles = 2 * math.pi * (turns_modulo_1 + positions.astype(jnp.float32) * remainders[None, None, None])
    scale = yarn_attention_factor(c.rope_factor) if c.rope_scaling == "yarn" else 1.0
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def rotate(
    x: Float[Array, "B L heads D"], cos: Float[Array, "B L 1 half"], sin: Float[Array, "B L 1 half"]
) -> Float[Array, "B L heads D"]:
    """Rotates each pair (x[i], x[i + D/2]) by its angle, in float32; returns the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
