"""Eight simulated devices, strict promotion and type checks, all set before JAX and ringattn are imported."""

import gc
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

gc.set_threshold(100_000, 20, 20)  # each collection visits all modules and calls back into XLA
FORCED = "--xla_force_host_platform_device_count"
# XLA:CPU compiles each fusion in an MLIR context of its own and generates code in parallel. For the small programs of
# tests both take a third of the compile time. Its older emitters, which jax 0.12 no longer has, compile the same HLO.
# Processes of tests get these flags too.
FAST_COMPILATION = "--xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
for flags in (f"{FORCED}=8", *FAST_COMPILATION.split()):
    if flags.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# LLVM's optimizations take a third of the compile time; the HLO is the same. Processes of tests inherit the setting.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # the tests and the processes that they start compile everything

import hypothesis
import jax
import jaxtyping
import pytest
from compile_once import compiled_once

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("ringattn", deadline=None)  # no test depends on the speed of the machine
hypothesis.settings.load_profile("ringattn")
# Excludes `config`, which has no arrays and checks its types itself. Excludes the modules that generate task texts,
# because their functions are called a million times for one training set.
root = Path(__file__).parents[1]
modules = {".".join(path.relative_to(root).with_suffix("").parts) for path in (root / "ringattn").rglob("[!_]*.py")}
unchecked_modules = ("ringattn.config", "ringattn.data.haystack", "ringattn.data.tasks")
jaxtyping.install_import_hook(
    [name for name in sorted(modules) if not name.startswith(unchecked_modules)], "beartype.beartype"
)

from ringattn.mesh.topology import arrange_devices


def pytest_collection_finish() -> None:
    """Excludes all imported modules and collected tests from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def reused_programs() -> Iterator[None]:
    """Compiles equal programs of a module's tests once."""
    with compiled_once():
        yield


@pytest.fixture(scope="session")
def make_mesh() -> Callable[..., jax.sharding.Mesh]:
    """make_mesh(data=1, context=1, tensor=1, context_outer=1): a mesh with these axis sizes over the first devices."""

    def make(data: int = 1, context: int = 1, tensor: int = 1, context_outer: int = 1) -> jax.sharding.Mesh:
        sizes = {"data": data, "context_outer": context_outer, "context": context, "tensor": tensor}
        return arrange_devices(sizes, jax.devices()[: math.prod(sizes.values())])

    return make


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disables the type checks of tests, so that a wrong argument raises the error that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def jax_options(**values: Any) -> Iterator[None]:
    """Sets options of `jax.config` inside the context."""
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles with all optimizations, for tests of the TPU compiler and of ratios of times."""
    with jax_options(jax_disable_most_optimizations=False):
        yield
