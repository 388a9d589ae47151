"""XLA flags with which a ring's transfers overlap with compute on GPUs."""

import os
import sys
from pathlib import Path

GPU_FLAGS = {
    "--xla_gpu_enable_latency_hiding_scheduler": "true",  # otherwise some permutes are synchronous
    "--xla_gpu_experimental_parallel_collective_overlap_limit": "8",  # default: one; a hop sends up to 7 arrays
}
"""Flags and their values. Compiled for eight H100 with both, every permute of a ring spans the attention of its hop."""
MEMORY_FRACTION = 0.9
"""Part of a GPU's memory that JAX allocates; its default is 0.75."""
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
NVIDIA_DRIVERS = Path("/proc/driver/nvidia"), Path("/dev/dxg")
"""Exist with an NVIDIA driver, on Linux and in WSL."""


def add_gpu_flags() -> tuple[str, ...]:
    """Adds GPU_FLAGS to XLA_FLAGS if there is an NVIDIA GPU. Returns the added ones, and prints them to stderr.

    Also sets JAX's part of the memory to MEMORY_FRACTION. Keeps values that the environment already gives. Has no
    effect after JAX has initialized its devices.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "cuda")
    if not any(path.exists() for path in NVIDIA_DRIVERS) or not {"cuda", "gpu"} & set(platforms.split(",")):
        return ()
    os.environ.setdefault(_FRACTION, str(MEMORY_FRACTION))
    given = os.environ.get("XLA_FLAGS", "").split()
    named = {flag.partition("=")[0] for flag in given}
    added = tuple(f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in named)
    if added:
        os.environ["XLA_FLAGS"] = " ".join([*given, *added])
        print(f"added to XLA_FLAGS, so that transfers overlap with compute: {' '.join(added)}", file=sys.stderr)
    return added


def compiler_options() -> dict[str, bool | int]:
    """Returns the flags as options of `jax.stages.Lowered.compile`, for a compilation without a GPU."""
    return {
        name.removeprefix("--"): value == "true" if value in ("true", "false") else int(value)
        for name, value in GPU_FLAGS.items()
    }
