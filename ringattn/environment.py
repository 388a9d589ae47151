"""Software and hardware that produced a result, as stored in environment.json."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Returns package versions, devices, number of CPU cores and processes, and the git commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: version(name) for name in packages},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpus": os.cpu_count(),
        "processes": jax.process_count(),
        "git": git_commit(),
    }


def git_commit() -> str | None:
    """Returns the commit of this checkout, with suffix '-dirty' for uncommitted changes; None outside a checkout."""
    command = ("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return result.stdout.strip() or None
