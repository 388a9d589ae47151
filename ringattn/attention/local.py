"""Picks the kernel that computes one device's queries against one shard of keys."""

from types import ModuleType

from ringattn.attention.kernels import xla

KERNELS: dict[str, ModuleType] = {"xla": xla}
"""Each a module of the two functions that `ringattn.attention.kernels` describes."""


def choose_kernel(kernel: str) -> ModuleType:
    """The kernel of that name; 'auto' picks the fastest that can. Raises ValueError on an unknown name."""
    if kernel == "auto":
        return xla
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is none of {', '.join(map(repr, ('auto', *KERNELS)))}")
    return KERNELS[kernel]
