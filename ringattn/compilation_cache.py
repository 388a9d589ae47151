"""Keeps programs of several CPU devices out of JAX's persistent compilation cache, from which XLA loads them wrongly.

XLA orders the collectives of a CPU program by a resource that they share: each starts after the one before. A program
that is written to the cache and loaded again has one such resource per computation, so a `while` loop with collectives
(the hops of a ring, a scan over layers) is no longer ordered relative to the collectives outside it. All
collective-permutes of a shard_map have the same channel id, by which XLA:CPU finds the partners of a transfer, so two
that run at the same time exchange their data: losses differ from the second start on, or the process aborts or hangs.
`tests/xla_cpu_order.py` reproduces it with jax 0.10.2 and 0.12.0.1, and `tests/test_compilation_cache.py` fails as soon
as XLA keeps the order. This file can then be deleted.
"""

import logging

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh

_log = logging.getLogger(__name__)


def disable_for_cpus(mesh: AbstractMesh) -> None:
    """Disables the persistent compilation cache of this process if `mesh` has several CPU devices.

    JAX reads the setting when it compiles. A call while a program is traced therefore applies to that program. It also
    applies to entries that are in the cache already, to a cache directory that is set later, and, because JAX has one
    setting per process, to programs for other devices in the same process.
    """
    device = mesh.abstract_device or jax.devices()[0]
    if mesh.size == 1 or device.device_kind != "cpu" or not jax.config.values["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX keeps an earlier answer to whether the cache is enabled
    if jax.config.values["jax_compilation_cache_dir"] and jax.process_index() == 0:
        reason = f"XLA would execute the collectives of a program for {mesh.size} CPU devices in the wrong order"
        _log.warning("the persistent compilation cache is disabled: %s after loading it from the cache", reason)
