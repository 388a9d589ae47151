"""Time of collectives on the links between devices, and of copies on the links to their hosts.

A permute sends its operand to one neighbor. All other collectives are counted as on a ring of n devices, as XLA runs
them along one axis of a torus (https://jax-ml.github.io/scaling-book/sharding): an all-gather or a reduce-scatter sends
(n - 1) / n of the full array, an all-reduce twice as much. On TPUs these use both directions of the link; an all-to-all
sends n / 8 times a device's array per direction. Through the switch of GPUs, an all-to-all sends (n - 1) / n of it.
Copies of offloaded arrays use the device's link to its host, once in each direction.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ringattn.cost.program import Op
from ringattn.cost.roofline import arrays
from ringattn.hardware import CHIPS, NETWORKS, host_bandwidth
from ringattn.mesh.processes import host_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HOST_COPIES = ("copy to host", "copy from host")
_COPIES = ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start")


def host_copy(op: Op) -> str | None:
    """Returns the kind of the copy in `HOST_COPIES` that an op starts; None if it starts none."""
    name = op.name if op.kind == "fusion-start" else op.kind  # "fusion-start": the GPU compiler's
    found = arrays(op.shape)
    if not name.startswith(_COPIES) or not any(array.on_host for array in found):
        return None
    to_host = name.startswith("dynamic-update-slice") or (name.startswith("copy") and found[0].on_host)
    return HOST_COPIES[0] if to_host else HOST_COPIES[1]


class Sent(NamedTuple):
    """Bytes that a device sends for one execution of a collective or a copy, and the time on the link."""

    bytes: int
    seconds: float | None


class Links:
    """Links of the devices of a mesh."""

    def __init__(self, devices: Sequence[Any]):
        """`devices` are those of the mesh, in its order."""
        self._devices, chip = devices, CHIPS.get(devices[0].device_kind)
        self._is_tpu = devices[0].platform == "tpu"
        self.bandwidth = None if chip is None or devices[0].platform == "cpu" else chip.link_bandwidth
        """Bytes/s to one neighbor, one way; None if unknown."""

    def sent(self, kind: str, op: Op) -> Sent:
        """Returns the bytes and the time of a collective or a copy, of `kind`, of scheduled HLO."""
        if kind in HOST_COPIES:
            own = max(array.size for array in arrays(op.shape) if not array.on_host)
            return Sent(own, None if self.bandwidth is None else own / host_bandwidth(self._devices[0].device_kind))
        found = arrays(op.shape.partition(", u32[]")[0] if kind == "collective-permute" else op.shape)
        sizes = [array.size for array in found]
        count, members = self._members(op)
        if kind == "collective-permute":
            own = sizes[0] if len(sizes) > 1 else sum(sizes)
            return Sent(own, self._seconds(own, self._distance(op)))
        # A start has operands and results: of an all-gather the results are larger, of a reduce-scatter the operands.
        split = len(sizes) // 2 if (len(sizes) > 1 and op.shape.startswith("((")) or len(sizes) == 2 else 0
        full = max(sum(sizes[:split]), sum(sizes[split:]))
        if kind == op.kind == "reduce-scatter" and not split:  # not of an all-reduce whose result is then sliced
            full *= count
        share = (count - 1) / count
        if kind == "all-to-all":
            own = int(full * share)
            return Sent(own, self._seconds(full * count / 8 if self._is_tpu else own, 1, members))
        own = int(full * share * (2 if kind == "all-reduce" else 1))
        return Sent(own, self._seconds(own / 2 if self._is_tpu else own, 1, members))

    def _seconds(self, sent: float | int, hops: int, members: Sequence[int] | None = None) -> float | None:
        if self.bandwidth is None:
            return None
        network = NETWORKS.get(self._devices[0].device_kind)
        if network is None:
            return sent * hops / self.bandwidth
        crosses = hops > 1 if members is None else len({host_of(self._devices[each]) for each in members}) > 1
        return sent / (network if crosses else self.bandwidth)

    def _members(self, op: Op) -> tuple[int, Sequence[int]]:
        """Returns the size of the groups of a collective, and the members of the first one."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", op.rest):
            group = [int(n) for n in listed[1].split(",")]
            return len(group), group
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", op.rest):
            return int(iota[2]), range(int(iota[2]) if int(iota[1]) == 1 else len(self._devices))
        return len(self._devices), range(len(self._devices))

    def _distance(self, op: Op) -> int:
        """Returns the longest way of a permute, in links; between GPUs 1 on one host and 2 between hosts."""
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", op.rest)
        found = re.findall(r"\{(\d+),(\d+)", pairs[0]) if pairs else []
        if not self._is_tpu:
            return 1 + any(host_of(self._devices[int(a)]) != host_of(self._devices[int(b)]) for a, b in found)
        coords = [each.coords for each in self._devices]
        sides = [max(side) + 1 for side in zip(*coords, strict=True)]

        def way(a: int, b: int) -> int:
            steps = [abs(x - y) for x, y in zip(coords[a], coords[b], strict=True)]
            return max(sum(min(step, side - step) for step, side in zip(steps, sides, strict=True)), 1)

        return max((way(int(a), int(b)) for a, b in found), default=1)
