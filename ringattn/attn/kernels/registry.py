"""Kernels by name."""

from ringattn.attn.kernels import xla
from ringattn.attn.kernels.protocol import Kernel

KERNELS: dict[str, Kernel] = {"xla": xla}


def choose_kernel(name: str) -> Kernel:
    """Returns the kernel of that name; "auto" picks the fastest for the device, at present "xla".

    Raises ValueError for an unknown name.
    """
    if name == "auto":
        return xla
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} must be one of {', '.join(map(repr, ('auto', *KERNELS)))}")
    return KERNELS[name]
