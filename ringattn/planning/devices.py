"""Devices to compile for: those of a TPU or GPU topology, which need not be present, or simulated CPU devices."""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from ringattn import config
from ringattn.mesh.devices import MAX_SIMULATED, start
from ringattn.planning.gpus import GPUS, gpu_devices, hosts_and_gpus
from ringattn.units import first_line

PODS = {"v3": (2, 1024), "v4": (3, 4096), "v5e": (2, 256), "v5p": (3, 8960), "v6e": (2, 256), "tpu7x": (3, 9216)}
"""Number of sides of a topology, and chips of a whole pod, by TPU: https://docs.cloud.google.com/tpu/docs/v5e (also v3,
v4, v5p, v6e, tpu7x)."""


def devices_of(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology such as 'v5e:8x8', 'v5p:4x4x4', 'h100:8', 'h100:2x8' or 'cpu:8'.

    It starts JAX on the CPU. Raises ValueError, with a fix, if the topology does not exist or its compiler (the extras
    `tpu` and `gpu-compiler`) is not installed.
    """
    check_topology(topology)
    name, _, size = topology.partition(":")
    if name == "cpu":
        return list(start(config.Mesh(simulate=int(size))).devices.flat)
    if name in GPUS:
        return gpu_devices(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology {topology} needs the TPU compiler, on Linux; pip install -e '.[tpu]'")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # libtpu requires it on a machine without a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # else a second plan at the same time fails
    jax.config.update("jax_platforms", "cpu")
    # By default libtpu assumes hosts of 2 x 2 chips, and then rejects a single chip.
    host = {"chips_per_host_bounds": (1, 1, 1)} if set(size) == {"1", "x"} else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **host).devices
    except Exception as error:  # the plugin's errors have no narrower type
        raise ValueError(f"--topology {topology}: {first_line(error)}; use one such as v5e:8x8 or v5p:4x4x4") from None


def check_topology(topology: str) -> None:
    """Raises ValueError, with a fix, unless `topology` can exist."""
    name, _, size = topology.partition(":")
    if name == "cpu":
        if not re.fullmatch(r"[0-9]{1,9}", size) or not 1 <= int(size) <= MAX_SIMULATED:
            raise ValueError(f"--topology {topology} must be cpu:N with N from 1 to {MAX_SIMULATED}; use cpu:8")
        return
    if name in GPUS:
        hosts_and_gpus(topology)
        return
    if name not in PODS:
        near = difflib.get_close_matches(name.lower(), [*PODS, *GPUS], n=1)
        fix = f"did you mean {_example(near[0])}?" if near else "use one such as v5e:8x8, v5p:4x4x4, h100:8 or cpu:8"
        supported = f"plans support the TPUs {', '.join(PODS)}, the GPUs {', '.join(GPUS)} and CPU devices (cpu:N)"
        raise ValueError(f"--topology {topology}: {supported}; {fix}")
    count, pod = PODS[name]
    if not re.fullmatch("x".join([r"[1-9][0-9]{0,8}"] * count), size):
        form = "x".join("ABC"[:count])
        raise ValueError(f"--topology {topology} must be {name}:{form}, with sides in chips; use {_example(name)}")
    sides = [int(side) for side in size.split("x")]
    if math.prod(sides) > pod:
        rule = f"has {math.prod(sides):,} chips, more than a pod of {pod:,}"
        raise ValueError(f"--topology {topology} {rule}; use one such as {_example(name)}")
    if (sides[0] % 2 or sides[1] % 2) and math.prod(sides) > 1:
        even = [max(side - side % 2, 2) for side in sides[:2]] + sides[2:]
        fix = f"{name}:{'x'.join(map(str, even))}" if math.prod(even) <= pod else _example(name)
        raise ValueError(
            f"--topology {topology}: the first two sides must be even, for hosts of 2 x 2 chips; use {fix}"
        )


def _example(name: str) -> str:
    return f"{name}:8" if name in GPUS else f"{name}:{'x'.join('4' * PODS[name][0])}"
