"""The longest rows on the devices of a topology and on a half, a quarter and an eighth of them."""

from collections.abc import Callable

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.cost.minimum import minimum_memory
from ringattn.planning.compile import Target
from ringattn.planning.longest import MaxContext, Need, Reach
from ringattn.planning.parallel import compile_all, needed_apart
from ringattn.planning.reach import LOCAL, Measure, Slopes, search, slopes_of
from ringattn.planning.resize import resized
from ringattn.planning.topologies import smaller


def sweep(
    c: config.Config,
    target: Target,
    say: Callable[[str], None],
    measure: Measure = needed_apart,
    known: Need | None = None,
) -> list[Reach]:
    """Returns the longest rows of `c` on the topology of `target` and on smaller ones, in order of devices.

    A device has the same memory in all of them. For each smaller topology, the search starts where the largest one
    suggests, and uses its memory per token. `known` is what rows of `data.seq_len` need on `target`.
    """
    size = target.mesh.size
    largest = search(c, target, say, measure, known=known)
    divisible, jobs = with_values(c, {"data.seq_len": 2 * LOCAL * size}), list[Target]()
    for topology in smaller(target.topology):
        fewer = resized(divisible, target, topology)
        if fewer is not None:
            jobs.append(fewer)

    def reach(fewer: Target) -> Reach:
        ratio = size / fewer.mesh.size
        slopes = Slopes(*(None if each is None else each * ratio for each in vars(slopes_of(largest)).values()))
        start = with_values(c, {"data.seq_len": _start(c, target, fewer, largest)})
        return Reach(fewer.topology, fewer.mesh.size, search(start, fewer, say, measure, slopes))

    found = [Reach(target.topology, size, largest), *compile_all(reach, jobs)]
    return sorted(found, key=lambda each: each.devices)


def _start(c: config.Config, target: Target, fewer: Target, largest: MaxContext) -> int:
    """Returns the length that the longest rows on `target` suggest for fewer devices, which hold more state each."""
    rooms = [
        None if target.limit is None else target.limit - minimum_memory(c, each.mesh.shape).state
        for each in (target, fewer)
    ]
    share = 1.0 if rooms[0] is None or rooms[1] is None or rooms[0] <= 0 else max(rooms[1] / rooms[0], 0)
    count = fewer.mesh.size
    return max(int(largest.tokens / target.mesh.size * share) // LOCAL, 1) * LOCAL * count
