"""The target of a step on a smaller or larger topology of the same kind."""

from contextlib import suppress
from dataclasses import replace

from ringattn import config
from ringattn.mesh.axes import CONTEXT
from ringattn.mesh.devices import check_divisible, resolve
from ringattn.mesh.topology import arrange_devices
from ringattn.planning.compile import Target
from ringattn.planning.devices import devices_of


def resized(c: config.Config, target: Target, topology: str) -> Target | None:
    """Returns the target of another topology of the same kind, whose ring is shorter or longer.

    None if the other axes, or the sizes of `c`, do not fit it. CPU devices can only be fewer: JAX starts with a fixed
    number of them.
    """
    platform, _, count = topology.partition(":")
    devices = list(target.mesh.devices.flat)[: int(count)] if platform == "cpu" else devices_of(topology)
    mesh = replace(c.mesh, **{**target.mesh.shape, CONTEXT: -1})
    with suppress(ValueError):
        other = target._replace(topology=topology, mesh=arrange_devices(resolve(mesh, len(devices)), devices))
        check_divisible(c, other.mesh)
        return other
    return None
