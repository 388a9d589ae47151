"""Time of a compiled step: compute by the compiler's cycles, or by a roofline, and transfers that nothing hides."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from ringattn import config
from ringattn.cost.attention_kernels import (
    DIRECTIONS,
    KernelSpec,
    call_cycles,
    mean_counts,
    pallas_tilings,
    ring_kernels,
    step_heads,
    step_rings,
    step_trips,
)
from ringattn.cost.cycles import CYCLE_FLOPS, KernelSchedule
from ringattn.cost.flops import RECOMPUTED, product_weights, useful_step_flops
from ringattn.cost.program import KernelCall, Op, Program, kernel_call
from ringattn.cost.roofline import Roofline
from ringattn.cost.visited import ring_counts
from ringattn.hardware import CHIPS, Chip, chip_name
from ringattn.mesh.axes import DATA
from ringattn.planning.kernel_schedules import Found, compiling_kernels
from ringattn.planning.links import Links
from ringattn.planning.schedule import Collective, OpSeconds, Timeline

KERNEL_UTILISATION = 0.7
"""Assumed for kernels whose tiles are not counted: those of gather, ulysses and usp."""
DAY, HOUR = 86_400, 3_600


@dataclass(frozen=True)
class StepTime:
    """Time of one step. All seconds are per device."""

    source: str
    """Source of the compute seconds."""
    seconds: float
    """Compute, and transfers that it does not hide."""
    compute_seconds: float
    kernel_seconds: float
    """Attention kernels, part of the compute; 0 where XLA's own ops compute attention."""
    hbm_seconds: float
    """Operands and results of all ops at the bandwidth of the device's memory; part of the compute."""
    link_seconds: float
    """All transfers."""
    exposed_seconds: float
    """Transfers for which the device waits."""
    utilisation: float
    """Useful FLOPs, without recomputation and masked pairs, per second and peak FLOP/s (MFU)."""
    tokens_per_day: float
    """Tokens trained per day, by all devices together."""
    device_hours: float
    """For `train.steps` steps, of all devices together."""
    device_hours_per_billion_tokens: float


@contextmanager
def compiling_step_kernels(c: config.Config, topology: str, mesh: jax.sharding.Mesh) -> Iterator[Found]:
    """Compiles the kernels of the rings of a step in another process meanwhile; yields their schedules.

    Yields nothing for devices that are not TPUs, and for heads that the kernels do not support.
    """
    specs = _kernels(c, mesh)
    if not specs:
        yield iter(())
        return
    with compiling_kernels(topology, specs) as found:
        yield found


def _kernels(c: config.Config, mesh: jax.sharding.Mesh) -> list[KernelSpec]:
    """Returns the kernels of a hop of the first kind of layers."""
    kind, heads = _kind(mesh), step_heads(c.model, mesh)
    specs = ring_kernels(step_rings(c, mesh)[0][1], heads, segments=c.data.separate_documents)
    if kind not in CYCLE_FLOPS or c.attention.kernel == "xla":
        return []
    try:
        pallas_tilings(specs[0], kind)
    except ValueError:
        return []
    return specs


def analyse(
    text: str, c: config.Config, mesh: jax.sharding.Mesh, schedules: Iterable[tuple[KernelSpec, KernelSchedule | str]]
) -> tuple[StepTime | None, list[Collective]]:
    """Returns the time of a compiled step, None on devices of unknown speed, and its collectives.

    `text` is the scheduled HLO, and `schedules` those of the kernels that it calls.
    """
    devices, kind = list(mesh.devices.flat), _kind(mesh)
    chip, program, links = CHIPS.get(kind), Program(text, step_trips(c, mesh, kind)), Links(devices)
    if chip is None or devices[0].platform == "cpu":
        return None, Timeline(program, None, links).collectives()
    kernels, roofline = _kernel_seconds(program, c, mesh, dict(schedules)), Roofline(program)
    if kind in CYCLE_FLOPS:
        per_cycle, source = CYCLE_FLOPS[kind] / chip.flops, "the compiler's cycles, and bundles of attention kernels"

        def op_seconds(computation: str, op: Op) -> float | int:
            if _is_kernel(op):
                return kernels[kernel_call(op)]
            return (op.cycles or 0) * per_cycle
    else:
        source = "a roofline of products and memory traffic, because the compiler estimates no cycles"

        def op_seconds(computation: str, op: Op) -> float | int:
            work = roofline.traffic(computation, op)
            return max(work.flops / chip.flops, work.bytes / chip.memory_bandwidth)

    timeline = Timeline(program, op_seconds, links)
    found = timeline.collectives()
    return _step_time(c, mesh, timeline, found, source, _total(program, op_seconds, roofline, chip)), found


def _total(program: Program, op_seconds: OpSeconds, roofline: Roofline, chip: Chip) -> tuple[float | int, float | int]:
    """Returns the seconds of attention kernels, and of all memory traffic."""
    sums: dict[str, tuple[float, float]] = {}

    def run(computation: str) -> tuple[float | int, float | int]:
        if computation not in sums:
            kernels = traffic = 0.0
            for op in program.computations[computation]:
                kernels += op_seconds(computation, op) if _is_kernel(op) else 0.0
                traffic += roofline.traffic(computation, op).bytes / chip.memory_bandwidth
                for name, times in program.calls_of(computation, op):
                    inner = run(name)
                    kernels, traffic = kernels + times * inner[0], traffic + times * inner[1]
            sums[computation] = kernels, traffic
        return sums[computation]

    return run(program.entry)


def _step_time(
    c: config.Config,
    mesh: jax.sharding.Mesh,
    timeline: Timeline,
    collectives: list[Collective],
    source: str,
    parts: tuple[float | int, float | int],
) -> StepTime:
    chip, tokens = CHIPS[_kind(mesh)], c.train.batch_size * c.data.seq_len
    step_hours = mesh.size * timeline.seconds / HOUR
    return StepTime(
        source=source,
        seconds=timeline.seconds,
        compute_seconds=timeline.compute,
        kernel_seconds=parts[0],
        hbm_seconds=parts[1],
        link_seconds=sum(each.count * (each.link_seconds or 0) for each in collectives),
        exposed_seconds=timeline.seconds - timeline.compute,
        utilisation=useful_step_flops(c) / (mesh.size * timeline.seconds * chip.flops),
        tokens_per_day=tokens * DAY / timeline.seconds,
        device_hours=c.train.steps * step_hours,
        device_hours_per_billion_tokens=1e9 / tokens * step_hours,
    )


def _kind(mesh: jax.sharding.Mesh) -> str:
    return chip_name(list(mesh.devices.flat))


def _is_kernel(op: Op) -> bool:
    """Returns True for an attention kernel: a Pallas kernel on TPUs, cuDNN on GPUs."""
    return 'custom_call_target="tpu_custom_call"' in op.rest or 'custom_call_target="__cudnn$fmha' in op.rest


def _kernel_seconds(
    program: Program, c: config.Config, mesh: jax.sharding.Mesh, schedules: dict[KernelSpec, KernelSchedule | str]
) -> dict[KernelCall, float]:
    """Returns the seconds of each kernel call of a program, averaged over the kinds of layers."""
    kind = _kind(mesh)
    calls: Mapping[KernelCall, float | int] = program.cost.calls if kind in CYCLE_FLOPS else {}
    if not calls:
        return {}
    chip, known = CHIPS[kind], {}
    if schedules:
        tilings = pallas_tilings(next(iter(schedules)), kind)
        counts = mean_counts([(layers, ring_counts(ring, tilings)) for layers, ring in step_rings(c, mesh)])
        own = {call: tiles for call, tiles in counts.items() if call in calls}
        rows = c.train.batch_size // (mesh.shape[DATA] * c.train.accumulate)  # of a device; the counts are of one row
        known = {
            call: rows * each.total * CYCLE_FLOPS[kind] / chip.flops
            for call, each in call_cycles(kind, schedules, own).items()
        }
    return known | {call: _assumed(call, calls, c, mesh) for call in calls if call not in known}


def _assumed(
    call: KernelCall, calls: Mapping[KernelCall, float | int], c: config.Config, mesh: jax.sharding.Mesh
) -> float | int:
    """Returns the seconds of a kernel call that is no hop of a ring: its share of the attention of a step."""
    tokens = c.train.batch_size * c.data.seq_len
    attention = useful_step_flops(c) - 6 * product_weights(c.model, c.model.vocabulary or 0) * tokens
    direction = call.name.removeprefix("ringattn_")
    passes = 1 + RECOMPUTED[c.model.remat][1] if direction == "forward" else 1
    share = DIRECTIONS.get(direction, 1.0) * passes / 3 * attention / mesh.size
    same = sum(times for other, times in calls.items() if other.name == call.name)
    return share / same / (KERNEL_UTILISATION * CHIPS[_kind(mesh)].flops)
