"""Kernels by name."""

from ringattn.attn.kernels import xla
from ringattn.attn.kernels.protocol import Kernel

KERNELS: dict[str, Kernel] = {"xla": xla}


def choose_kernel(name: str) -> Kernel:
    """Returns the kernel of that name; "auto" picks the fastest for the device, at present "xla".

    Raises ValueError for an unknown name.
    """
    names = ("auto", *KERNELS)
    if name not in names:
        raise ValueError(f"kernel={name!r} must be one of {', '.join(map(repr, names))}")
    return xla if name == "auto" else KERNELS[name]
