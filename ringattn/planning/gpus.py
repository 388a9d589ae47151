"""GPUs that need not be present: what XLA's GPU compiler must know about them, and their devices.

Sources: the target configs of XLA, https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs
(h100_sxm, h200, b200), which were read from the drivers of these GPUs. `hardware.CHIPS` has their speeds.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ringattn.units import first_line

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
MAX_GPUS = 1024


class Gpu(NamedTuple):
    """A target of XLA's GPU compiler."""

    name: str
    """Its `device_kind` in `hardware.CHIPS`."""
    compute_capability: int
    """Major version; the minor one is 0."""
    cores: int
    memory: int
    """Bytes."""
    memory_bandwidth: int
    """Bytes/s."""
    l2_cache: int
    """Bytes."""
    clock: float
    """GHz."""

    def target(self) -> str:
        """Returns the target as text of XLA's protocol buffer GpuTargetConfigProto."""
        return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {self.compute_capability} minor: 0 }}
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {self.cores} fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_cache} clock_rate_ghz: {self.clock} device_memory_size: {self.memory}
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"
"""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 3_352_320_000_000, 52_428_800, 1.98),
    "h200": Gpu("NVIDIA H200", 9, 132, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965),
}
"""By the name that a topology begins with."""


def hosts_and_gpus(topology: str) -> tuple[int, int]:
    """Returns the number of hosts of a GPU topology, and of GPUs per host. Raises ValueError if it is not valid."""
    name, _, size = topology.partition(":")
    sides = [int(side) for side in size.split("x")] if re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?", size) else []
    hosts, gpus = (sides if len(sides) == 2 else [1, *sides]) if sides else (0, 0)
    if not 0 < hosts * gpus <= MAX_GPUS:
        rule = f"must be {name}:N or {name}:HOSTSxN with at most {MAX_GPUS} GPUs"
        raise ValueError(f"--topology {topology} {rule}; use {name}:8 or {name}:2x8")
    return hosts, gpus


def gpu_devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology such as 'h100:8' or 'h100:2x8': GPUs of one host, or hosts x GPUs.

    Raises ValueError, with a fix, if it does not exist or if JAX's CUDA plugin is not installed.
    """
    name, (hosts, gpus) = topology.partition(":")[0], hosts_and_gpus(topology)
    plugin = next((each for each in PLUGINS if importlib.util.find_spec(each) is not None), None)
    if plugin is None:
        fix = (
            f"pip install -e '.[gpu-compiler]' jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        )
        raise ValueError(f"--topology {topology} needs the GPU compiler, on Linux; {fix}")
    _find_tools()
    jax.config.update("jax_platforms", "cpu")
    try:
        # The compiler takes a slice for what NVLink connects; in a run, a slice is a host.
        shape, target = f"{hosts}x1x{gpus}", GPUS[name].target()
        return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices
    except Exception as error:  # the plugin's errors have no narrower type
        raise ValueError(f"--topology {topology}: {first_line(error)}; use one such as {name}:8") from None


def _find_tools() -> None:
    """Adds the directory of ptxas, of the package nvidia-cuda-nvcc, to PATH, unless PATH has one."""
    if shutil.which("ptxas") is None and (spec := importlib.util.find_spec("nvidia")) is not None:
        found = [path for root in spec.submodule_search_locations or () for path in Path(root).glob("*/bin/ptxas")]
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *(str(path.parent) for path in found)])
