"""Kernels by name, and the kernel that "auto" picks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ringattn.attn.choices import KERNELS
from ringattn.attn.kernels.cudnn import Cudnn, why_never
from ringattn.attn.kernels.pallas_tpu import PallasTpu
from ringattn.attn.kernels.protocol import Kernel
from ringattn.attn.kernels.tiles import largest_divisor
from ringattn.attn.kernels.xla import Xla
from ringattn.hardware import platform

XLA_TILES = {"cpu": (256, 128), "tpu": (512, 512), "gpu": (1024, 1024)}
"""Queries and keys in a tile of the kernel "xla", by platform.

CPU: a tile of logits stays in the cache. TPU: the compiler estimates 14.7% of a v5e's peak forward and 33.6% backward,
against 7.6% and 13% for 256 x 128, and 9.4% and 19% for 1,024 x 1,024, which spills out of VMEM. GPU: fewer loop turns,
because the host waits for each.
"""
PALLAS_HEADS = 8
"""Query heads in a grid step of the kernel "pallas", at most."""
PALLAS_QUERIES = {2: (512, 512), 4: (256, 512), 8: (256, 256)}
"""Queries in a tile, (forward, backward), by the most query heads in a grid step.

Bundles (cycles) per tile of 512 keys on a v5e, head dim 128, 4 heads, unmasked, and the ideal, counted as
`configs/benchmark_cycles.py` does. Forward: 128 queries 1,597 (1,024), 256 2,218 (2,048), 512 4,484 (4,096). Backward:
128 2,686 (2,560), 256 4,795 (5,120), 512 8,980 (10,240). Longer forward tiles gain little, and follow windows and
documents less closely. Bundles can be fewer than the ideal: the matrix units stall where the schedule does not show it.
"""
PALLAS_KEYS = 512
"""Keys in a tile."""
HEAD_BYTES = 256
"""Bytes of a head in VMEM, padded to 128 dims, for which these sizes fit. For twice as many, the sizes are halved."""


class KernelChoice(NamedTuple):
    """A kernel, its name, and the reasons for it, as sentences."""

    name: str
    kernel: Kernel
    reasons: tuple[str, ...]


def check_kernel_name(name: str) -> None:
    """Raises ValueError for an unknown name."""
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} must be one of {', '.join(map(repr, KERNELS))}")


def choose_kernel(
    kernel: str = "auto",
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike = "bfloat16",
    device_kind: str,
) -> KernelChoice:
    """Returns the kernel of `ringattn.attention`, with reasons.

    Args:
      kernel: "xla" (any device), "pallas" (TPU; on a CPU it runs in an interpreter, for tests), "cudnn" (GPU), or
        "auto": the fastest that serves the device, the dtype and the head dim.
      heads, kv_heads: number of query heads and of K/V heads.
      head_dim: dim of queries and keys, or of values if that is larger.
      dtype: dtype of query, key and value.
      device_kind: as in `jax.devices()[0].device_kind`.

    Raises:
      ValueError: for an unknown name, or a named kernel that cannot serve.
    """
    check_kernel_name(kernel)
    where = platform(device_kind)
    head_bytes = -(-head_dim // 128) * 128 * jnp.dtype(dtype).itemsize
    xla, pallas = Xla(XLA_TILES[where]), _pallas(heads // kv_heads, head_bytes, interpret=where != "tpu")
    name = jnp.dtype(dtype).name
    refusals = {"pallas": _pallas_refusal(device_kind, name), "cudnn": why_never(head_dim, name, device_kind)}
    if kernel != "auto":
        if refusals.get(kernel) is not None:
            raise ValueError(f"kernel={kernel!r} {refusals[kernel]}; use kernel='auto' or kernel='xla'")
        named = {"xla": xla, "pallas": pallas, "cudnn": Cudnn(fallback=None)}
        return KernelChoice(kernel, named[kernel], (f"kernel={kernel!r} is given",))
    if where == "tpu" and refusals["pallas"] is None:
        return KernelChoice("pallas", pallas, (f"{device_kind}: one fused kernel for every mask",))
    if where == "gpu" and refusals["cudnn"] is None:
        reason = f"{device_kind}: cuDNN for calls without masks, and for causal ones with implied positions"
        return KernelChoice("cudnn", Cudnn(fallback=xla), (reason, "'xla' for all others: `kernels.cudnn.why_not`"))
    slow = "the kernel 'pallas' would run in an interpreter"
    why = {"cpu": slow, "tpu": f"the kernel 'pallas' {refusals['pallas']}", "gpu": f"cuDNN {refusals['cudnn']}"}
    return KernelChoice("xla", xla, (f"{device_kind}: {why[where]}",))


def _pallas(shared_heads: int, head_bytes: int, interpret: bool) -> PallasTpu:
    """Returns the kernel for K/V heads that are shared by `shared_heads` query heads of `head_bytes`."""
    scale = -(-head_bytes // HEAD_BYTES)
    heads = largest_divisor(shared_heads, max(PALLAS_HEADS // scale, 1))
    sizes = next(sizes for most, sizes in PALLAS_QUERIES.items() if heads <= most)
    multiple = 1 if interpret else 128
    forward, backward = ((max(size // scale, multiple), PALLAS_KEYS) for size in sizes)
    return PallasTpu(forward, multiple, interpret, backward, heads)


def _pallas_refusal(device_kind: str, dtype: str) -> str | None:
    """Returns why the kernel "pallas" cannot serve, as the end of a sentence; None if it can."""
    if platform(device_kind) == "gpu" or device_kind in ("TPU v2", "TPU v3"):
        return f"takes TPUs from v4, and this device is {device_kind}"
    if jax.dtypes.canonicalize_dtype("int64") == "int64":
        return "takes 32-bit indices, and jax_enable_x64 is set"
    if dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, and the inputs are {dtype}"
    return None
