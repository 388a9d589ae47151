"""What a result may depend on beyond its config, as environment.json keeps it."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Versions, devices, processor cores, the commit of the source."""
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
    """The commit of the checkout that holds this file, '-dirty' behind it if something is changed; None outside."""
    command = ("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None
