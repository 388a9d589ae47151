"""Eight simulated devices, strict promotion, checked types: all set before JAX and ringattn are imported."""

import math
import os
from collections.abc import Callable
from pathlib import Path

FORCED = "--xla_force_host_platform_device_count"
if FORCED not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FORCED}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# All but the config: it holds no arrays, and says itself, in a user's words, what is mistyped.
rooms = {path.stem for path in (Path(__file__).parents[1] / "ringattn").iterdir()} - {
    "config",
    "__init__",
    "__pycache__",
}
jaxtyping.install_import_hook([f"ringattn.{room}" for room in sorted(rooms)], "beartype.beartype")

from ringattn.mesh import arrange


@pytest.fixture
def make_mesh() -> Callable[..., jax.sharding.Mesh]:
    """make_mesh(data=1, context=1, tensor=1, context_outer=1): the project's mesh over the first devices there are."""

    def make(data: int = 1, context: int = 1, tensor: int = 1, context_outer: int = 1) -> jax.sharding.Mesh:
        sizes = {"data": data, "context_outer": context_outer, "context": context, "tensor": tensor}
        return arrange(sizes, jax.devices()[: math.prod(sizes.values())])

    return make


@pytest.fixture
def unchecked():
    """Without the types that tests check, so that a wrong argument meets the message that users meet."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
