"""Agreement of the processes on a number, without waiting for one another."""

import jax
import jax.numpy as jnp
import numpy as np

from ringattn.mesh.processes import gather, several_processes


class Agreement:
    """Gives all processes the largest number that one of them has passed, at the same call.

    With several processes, a call returns the maximum of the numbers passed to the previous call, so that the host
    does not wait for the devices: they compute the maximum after the step that is already dispatched.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._maximum = jax.jit(jnp.max)
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Returns the maximum of the previous call, or `number` itself in a single process.

        All processes must call it equally often, between the same programs.
        """
        if not several_processes():
            return number
        own = np.full(jax.local_device_count(), number, np.int32)
        previous, numbers = self._pending, jax.make_array_from_process_local_data(self._sharding, own)
        self._pending = self._maximum(numbers)
        return 0 if previous is None else int(previous)

    def now(self, number: int) -> int:
        """Returns the maximum of the numbers that the processes pass to this call, for which it waits."""
        self._pending = None
        return max(map(int, gather(str(number))))
