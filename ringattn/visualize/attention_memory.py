"""Memory of attention in bytes per device, as reported by the compiler, and a linear law fitted to it.

The compiled function is `ringattn.attention`, as in training. Nothing is executed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ringattn.attn.attention import attention
from ringattn.cost.memory import program_memory
from ringattn.layout import check_length
from ringattn.mesh.axes import HEADS, SEQUENCE
from ringattn.mesh.devices import ring_mesh

Curve = Mapping[int, float | int]
"""Bytes or tokens, by number of tokens or of devices."""

STRATEGIES = ("dense", "gather", "ring")
MAX_DENSE_LOGITS = 2**35
"""Largest dense attention that is compiled. The CPU compiler of jax 0.12 crashes (SIGFPE) from 2**37 logits."""


class Shape(NamedTuple):
    """Shape of one layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


LLAMA = Shape(heads=32, kv_heads=8, head_dim=128, dtype="float32")
"""Llama-3 8B in float32. The CPU compiler converts much of a bfloat16 program to float32."""


def attention_bytes(
    strategy: str, length: int, devices: int, layout: str = "zigzag", shape: Shape = LLAMA, total: bool = False
) -> int:
    """Bytes per device for causal attention of one row, forward and backward, as reported by the compiler.

    Nothing is executed, so the program may be larger than this machine's memory.

    Args:
      strategy: as in `ringattn.attention`; or "dense": `jax.nn.dot_product_attention` of the whole row on one device,
        regardless of `devices`, with at most MAX_DENSE_LOGITS logits.
      length: tokens of the row.
      devices: size of the ring, over the first devices of the process.
      layout: order of the row over the shards.
      shape: shape of the layer.
      total: add arguments and results (query, key, value, output, and the gradient of each) to the temporaries.

    Raises ValueError if the process has too few devices, if the length does not fit the layout or is too long for
    dense attention, or if the strategy does not exist.
    """
    temporaries, arguments_and_results = _planned_bytes(strategy, length, devices, layout, shape)
    return temporaries + arguments_and_results * total


@functools.cache
def _planned_bytes(strategy: str, length: int, devices: int, layout: str, shape: Shape) -> tuple[int, int]:
    """Bytes of temporaries, and of arguments and results. Nothing is donated, so no result reuses an argument."""
    dense = strategy == "dense"
    mesh = ring_mesh(1 if dense else devices)
    if not dense:
        check_length(length, layout, devices, shards_name="devices")
    elif length > max_dense_length(shape):
        raise ValueError(
            f"length={length} must be at most {max_dense_length(shape)} for dense attention with {shape.heads} heads; "
            "use that length, and four times its bytes per doubling"
        )
    sharding = jax.NamedSharding(mesh, jax.P() if dense else HEADS)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if dense:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return attention(query, key, value, layout=layout, strategy=strategy, axis=SEQUENCE)

    def forward_backward(query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array) -> tuple:
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(d_out)

    arrays = [
        jax.ShapeDtypeStruct((1, length, heads, shape.head_dim), shape.dtype, sharding=sharding)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]
    with jax.set_mesh(mesh):
        planned = program_memory(jax.jit(forward_backward).lower(*arrays).compile())
    assert planned is not None, "CPU, GPU and TPU compilers report memory"
    return planned.temporaries, planned.arguments + planned.results


def max_dense_length(shape: Shape = LLAMA) -> int:
    """Tokens of the longest row for which dense attention is compiled."""
    return math.isqrt(MAX_DENSE_LOGITS // shape.heads)


def memory_curves(
    lengths: Sequence[int], devices: int, layout: str = "zigzag", shape: Shape = LLAMA
) -> dict[str, dict[int, int]]:
    """Temporary bytes per device as {strategy: {length: bytes}}: gather and ring on `devices` devices, dense on one.

    The curve of dense attention ends at `max_dense_length`.
    """
    return {
        strategy: {
            length: attention_bytes(strategy, length, devices, layout, shape)
            for length in lengths
            if strategy != "dense" or length <= max_dense_length(shape)
        }
        for strategy in STRATEGIES
    }


def growth(curve: Curve) -> float:
    """Factor by which a curve grows when its argument doubles: 4 is quadratic, 2 linear, 1 constant.

    Computed from the last two points. Raises ValueError if the curve has fewer.
    """
    (x0, y0), (x1, y1) = sorted(curve.items())[-2:]
    return float((y1 / y0) ** (1 / np.log2(x1 / x0)))


class MemoryLaw(NamedTuple):
    """A linear law of a device's memory: per_local_token * local tokens + per_token * tokens of the row."""

    per_local_token: float
    """Bytes for each token of the local shard."""
    per_token: float
    """Bytes for each token of the whole row; 0 if memory does not grow with the number of devices."""

    def reach(self, memory: float | int, devices: int) -> float:
        """Tokens of the longest row that fits `devices` devices with `memory` bytes each."""
        return memory * devices / (self.per_local_token + self.per_token * devices)


def fit_memory(by_devices: Curve, local: int) -> MemoryLaw:
    """Least-squares fit to {devices: bytes per device}, each device with `local` tokens."""
    devices, needed = np.array([*by_devices], float), np.array([*by_devices.values()], float)
    per_token, per_local_token = np.polyfit(devices, needed, 1) / local
    return MemoryLaw(per_local_token=float(per_local_token), per_token=max(float(per_token), 0.0))
