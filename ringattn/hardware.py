"""Peak FLOP/s, memory and link bandwidth of accelerators, per JAX device, keyed by `chip_name`.

Sources: for TPUs https://docs.cloud.google.com/tpu/docs/v5e (also v3, v4, v5p, v6e, tpu7x) and, for measured link
bandwidth, https://jax-ml.github.io/scaling-book/tpus (about 10% below Google's nominal figure); for NVIDIA the data
sheets at https://www.nvidia.com/en-us/data-center/ (h100, h200, hgx, a100, l4, tesla-t4), with memory as reported by
the driver.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


def platform(device_kind: str) -> str:
    """Returns "cpu", "tpu" or "gpu" for a `device_kind` of JAX."""
    if device_kind.lower() == "cpu":
        return "cpu"
    return "tpu" if device_kind.startswith("TPU") else "gpu"


def chip_name(devices: Sequence[Any]) -> str:
    """Returns the name in `CHIPS` of JAX devices of one kind: their `device_kind`, except for halves of v4 chips.

    As one device, a v4 chip is "TPU v4". The compiler for absent TPUs takes it for two devices, each a "TPU v4 core".
    """
    kind = devices[0].device_kind
    return f"{kind} core" if kind == "TPU v4" and any(device.core_on_chip for device in devices) else kind


class Chip(NamedTuple):
    """One JAX device. On TPU v3 and TPU7x, and as "TPU v4 core", it is half a chip; both halves share its links."""

    flops: float
    """Dense bfloat16 FLOP/s, without sparsity."""
    memory: float
    """Device memory in bytes."""
    memory_bandwidth: float
    """Device memory bandwidth in bytes/s."""
    link_bandwidth: float
    """Bandwidth to one neighbor in bytes/s, one way: over ICI, NVLink, or PCIe on cards without NVLink."""


CHIPS: dict[str, Chip] = {
    "TPU v3": Chip(61.5e12, 16 * 2**30, 450e9, 70e9),
    "TPU v4": Chip(275e12, 32 * 2**30, 1200e9, 45e9),
    "TPU v4 core": Chip(137.5e12, 16 * 2**30, 600e9, 45e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 45e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 90e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 90e9),
    "TPU7x": Chip(1153.5e12, 96 * 2**30, 3690e9, 90e9),
    "Tesla T4": Chip(65e12, 15 * 2**30, 320e9, 15.75e9),  # float16, because T4 has no native bfloat16
    "NVIDIA L4": Chip(121e12, 24e9, 300e9, 31.5e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 42.3e9, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 85.1e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 84.9e9, 3352e9, 450e9),
    "NVIDIA H200": Chip(989.4e12, 141e9, 4800e9, 450e9),
    "NVIDIA B200": Chip(2250e12, 191.5e9, 8000e9, 900e9),
}
"""Supported chips by `chip_name`. NVIDIA figures come from data sheets and were not measured."""

NETWORKS = {"NVIDIA H100 80GB HBM3": 50e9, "NVIDIA H200": 50e9, "NVIDIA B200": 50e9}
"""Bandwidth of a GPU to other hosts in bytes/s, one way: one 400 Gbit/s adapter per GPU, as in DGX H100, H200 and B200
(https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html, also dgxb200)."""

HOST_BANDWIDTH = 16e9
"""Bandwidth between a device and its host in bytes/s, one way, where `HOST_LINKS` has no other: that of TPUs up to v5p
(https://jax-ml.github.io/scaling-book/tpus), and half of a PCIe 4.0 x16 slot."""
HOST_LINKS = {"TPU v6 lite": 32e9, "NVIDIA H100 80GB HBM3": 64e9, "NVIDIA H200": 64e9, "NVIDIA B200": 64e9}
"""Bandwidth between a device and its host in bytes/s, one way, by `device_kind`: v6e from the same source, GPUs with
PCIe 5.0 x16 from their data sheets."""


def host_bandwidth(device_kind: str) -> float:
    """Returns the bandwidth between a device and its host in bytes/s, one way."""
    return HOST_LINKS.get(device_kind, HOST_BANDWIDTH)


HOST_MEMORY = {
    "TPU v3": 340e9 / 8,  # v3-8
    "TPU v4": 407e9 / 8,  # ct4p-hightpu-4t; plans compile for half chips
    "TPU v5 lite": 192e9 / 4,  # ct5lp-hightpu-4t
    "TPU v5": 448e9 / 4,  # ct5p-hightpu-4t
    "TPU v6 lite": 720e9 / 4,  # ct6e-standard-4t
    "TPU7x": 960e9 / 8,  # tpu7x-standard-4t, two devices per chip
    "NVIDIA H100 80GB HBM3": 1872e9 / 8,  # a3-highgpu-8g
    "NVIDIA H200": 2952e9 / 8,  # a3-ultragpu-8g
    "NVIDIA B200": 3968e9 / 8,  # a4-highgpu-8g
}
"""Memory of a host per device in bytes, of Google's virtual machines with a whole host.

Sources: for v5p, v6e and TPU7x https://docs.cloud.google.com/tpu/docs/tpu7x (RAM of a VM with 4 chips); for v5e
https://docs.cloud.google.com/tpu/docs/v5e (VM types; ct5lp-hightpu-8t has as much per chip); for v3 and v4
https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus; for GPUs
https://docs.cloud.google.com/compute/docs/accelerator-optimized-machines. Google's GB of memory are 2^30 bytes. They
count as 10^9 here, which leaves 7 % for the operating system."""
