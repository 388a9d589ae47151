"""Software and hardware that produced a result, as stored in environment.json."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Returns package versions, devices, number of CPU cores and processes, XLA_FLAGS, and the git commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: version(name) for name in packages},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpus": os.cpu_count(),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": git_commit(),
    }


def git_commit() -> str | None:
    """Returns the commit of the project's checkout, with suffix '-dirty' for uncommitted changes.

    Returns None outside a checkout, or if the package is inside the repository of another project.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        with (root / "pyproject.toml").open("rb") as file:
            name = tomllib.load(file).get("project", {}).get("name")
        if name != "ringattn" or Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return _git(root, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, ValueError, subprocess.CalledProcessError):  # an installed package, no git, or no repository
        return None


def _git(directory: Path, *words: str) -> str:
    # In a git hook, these variables name the repository of the hook.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    result = subprocess.run(
        ["git", *words], cwd=directory, env=environ, check=True, capture_output=True, text=True, encoding="utf-8"
    )
    return result.stdout.strip()
