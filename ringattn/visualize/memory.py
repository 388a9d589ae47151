"""Numbers behind the memory curves: what a device needs for attention, as the compiler plans it. Nothing is computed.

All of it is asked of the compiler, about `ringattn.attention`, the code that trains; a law is fitted to its answers.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ringattn.attention import attention
from ringattn.layout import check_length
from ringattn.mesh import HEADS, SEQUENCE, ring

Curve = Mapping[int, float | int]
"""What is needed, or reached, at each number of tokens or of devices."""

SHOWN = ("dense", "gather", "ring")
LOGITS = 2**35
"""The most for which dense attention is compiled: of 2**37 and more jax 0.12's compiler for CPUs has died (SIGFPE)."""


class Shape(NamedTuple):
    """Of a layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


LLAMA = Shape(heads=32, kv_heads=8, head_dim=128, dtype="float32")
"""Llama-3 8B's, in float32: the compiler for CPUs turns much of bfloat16 into it."""


def attention_bytes(
    strategy: str, length: int, devices: int, layout: str = "zigzag", shape: Shape = LLAMA, whole: bool = False
) -> int:
    """Bytes of a device for causal attention of one row, forward and backward, as the compiler plans them.

    Temporaries alone, or all: its shards of query, key, value and output, and of their gradients, as well. Nothing is
    computed, so that what fits no memory can be asked for, too.

    Args:
      strategy: as of `ringattn.attention`; or "dense": `jax.nn.dot_product_attention` of the whole row on one device,
        whatever `devices` says, of at most LOGITS logits.
      length: tokens of the row.
      devices: of the ring; the first that there are.
      layout: how the row lies over them.
      shape: of the layer.
      whole: whether arguments and results are counted beside the temporaries.

    Raises ValueError if there are not so many devices, the length does not fit them or is too long for dense, or there
    is no such strategy.
    """
    temporaries, rest = _planned(strategy, length, devices, layout, shape)
    return temporaries + rest * whole


@functools.cache
def _planned(strategy: str, length: int, devices: int, layout: str, shape: Shape) -> tuple[int, int]:
    """Bytes of temporaries; of arguments and results, of which none lies in another's place: nothing is donated."""
    dense = strategy == "dense"
    mesh = ring(1 if dense else devices)
    if not dense:
        check_length(length, layout, devices)
    elif length > longest_dense(shape):
        raise ValueError(
            f"length={length} is too long to compile dense attention of {shape.heads} heads: ask for up to "
            f"{longest_dense(shape)}, and take four times as much for twice the length"
        )
    spread = jax.NamedSharding(mesh, jax.P() if dense else HEADS)

    def attend(query: Any, key: Any, value: Any) -> Any:
        if dense:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return attention(query, key, value, layout=layout, strategy=strategy, axis=SEQUENCE)

    def both(query: Any, key: Any, value: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(d_out)

    arrays = [
        jax.ShapeDtypeStruct((1, length, heads, shape.head_dim), shape.dtype, sharding=spread)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]
    with jax.set_mesh(mesh):
        planned = jax.jit(both).lower(*arrays).compile().memory_analysis()
    assert planned is not None, "the compilers for CPU, GPU and TPU all tell"
    assert not planned.alias_size_in_bytes
    return planned.temp_size_in_bytes, planned.argument_size_in_bytes + planned.output_size_in_bytes


def longest_dense(shape: Shape = LLAMA) -> int:
    """Tokens of the longest row for which dense attention is compiled."""
    return math.isqrt(LOGITS // shape.heads)


def memory_curves(
    lengths: Sequence[int], devices: int, layout: str = "zigzag", shape: Shape = LLAMA
) -> dict[str, dict[int, int]]:
    """{strategy: {length: temporary bytes}} by `attention_bytes`: gather, ring on so many devices, dense on one.

    The curve of dense attention has no more lengths than it is compiled for.
    """
    return {
        strategy: {
            length: attention_bytes(strategy, length, devices, layout, shape)
            for length in lengths
            if strategy != "dense" or length <= longest_dense(shape)
        }
        for strategy in SHOWN
    }


def doubling(curve: Curve) -> float:
    """By how much a curve grows at its end where what it goes with doubles: 4 is quadratic, 2 linear, 1 flat.

    Of the last two points; raises ValueError if there are not two.
    """
    (less, before), (more, after) = sorted(curve.items())[-2:]
    return float((after / before) ** (1 / np.log2(more / less)))


class Need(NamedTuple):
    """A law of a device's bytes, of those that the fitted curve counts: local tokens * (own + row * devices)."""

    own: float
    """Bytes for each token that the device holds."""
    row: float
    """Bytes for each token of the row, whoever holds it; 0 where memory does not grow with the devices."""

    def reach(self, memory: float | int, devices: int) -> float:
        """Tokens of the longest row that so many devices can take, if each has so many bytes for what is counted."""
        return memory * devices / (self.own + self.row * devices)


def fit(needed: Curve, local: int) -> Need:
    """The law of the bytes that were found at some numbers of devices with `local` tokens each, by least squares."""
    row, own = np.polyfit(np.array([*needed], float), np.array([*needed.values()], float), 1) / local
    return Need(own=float(own), row=max(float(row), 0.0))
