"""The report of a plan: lines for the terminal, and Markdown with pictures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ringattn.mesh.axes import describe_sizes
from ringattn.planning.changes import order
from ringattn.planning.compile import Plan
from ringattn.planning.decoding import DecodePlan, report_decode
from ringattn.planning.longest import MaxContext, Reach
from ringattn.planning.pictures import length_picture, memory_picture, reach_picture, ring_picture
from ringattn.planning.ranking_table import HEADER as RANKED
from ringattn.planning.ranking_table import ranked_cells, ranking_lines
from ringattn.planning.schedule import Collective
from ringattn.planning.timing import StepTime
from ringattn.runs.files import write_figure, write_json, write_text
from ringattn.units import bytes_in_words, duration_in_words


class Row(NamedTuple):
    """Transfers of one kind. Bytes and seconds are per device and step."""

    name: str
    bytes: float
    count: float
    link: float | None
    exposed: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """Name, bytes, count, milliseconds on the link, milliseconds exposed, and the hidden percentage."""
        if self.link is None or self.exposed is None:
            return self.name, bytes_in_words(self.bytes), f"{self.count:,.0f}", "?", "?", "?"
        hidden = 1 - min(self.exposed / self.link, 1) if self.link else 0
        times = f"{1e3 * self.link:,.2f}", f"{1e3 * self.exposed:,.2f}"
        return self.name, bytes_in_words(self.bytes), f"{self.count:,.0f}", *times, f"{100 * hidden:.0f} %"


HEADER = ("transfers", "sent", "count", "link ms", "exposed ms", "hidden")


def rows(collectives: list[Collective]) -> list[Row]:
    """Returns the hops of the ring by array, and then all other transfers by op."""
    found: dict[str, Row] = {}
    is_hop = [each for each in collectives if each.part.startswith("ring")]
    others = [each for each in collectives if not each.part.startswith("ring")]
    for each in [*sorted(is_hop, key=lambda hop: hop.part, reverse=True), *others]:
        name = f"{each.part}, {each.array}" if each in is_hop else f"{each.part}, {each.op}"
        row = found.get(name, Row(name, 0, 0, 0.0, 0.0))
        times = [
            None if old is None or new is None else old + each.count * new
            for old, new in ((row.link, each.link_seconds), (row.exposed, each.exposed_seconds))
        ]
        found[name] = Row(name, row.bytes + each.count * each.bytes, row.count + each.count, *times)
    return list(found.values())


def report(plan: Plan | DecodePlan) -> Iterator[str]:
    """Yields the lines of a plan's report."""
    if isinstance(plan, DecodePlan):
        yield from report_decode(plan)
        return
    yield f"{plan.topology}, {math.prod(plan.mesh.values())} of {plan.device_kind}, mesh {describe_sizes(plan.mesh)}"
    yield f"{plan.parameters:,} parameters, rows of {plan.tokens:,} tokens"
    yield "memory per device at the peak:"
    yield from (f"  {name:<28}{size:>12}" for name, size in memory_lines(plan))
    if plan.collectives:
        yield "transfers per device and step:"
        yield from aligned([HEADER, *(row.cells for row in rows(plan.collectives))])
    if plan.time is not None:
        yield f"time per step, by {plan.time.source}:"
        yield from (f"  {name:<28}{value:>12}" for name, value in time_lines(plan.time))
    elif plan.fits:
        yield f"time per step: unknown, because the speed of {plan.device_kind} is unknown"
    yield from ranking_lines(plan.ranking, plan.reasons)
    if plan.sweep is not None:
        yield "longest rows by devices:"
        yield from aligned([REACH_HEADER, *reach_rows(plan.sweep)])
    if plan.max_context is not None:
        yield f"longest rows that fit: {plan.max_context.tokens:,} tokens"
    yield f"{compiled(plan)}: {verdict(plan)}"
    if plan.changes:
        yield f"to make it fit, {order(plan.changes)}:"
        yield from (f"  {change}" for change in plan.changes)


def aligned(table: list[tuple[str, ...]]) -> Iterator[str]:
    """Yields the lines of a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        ends = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        yield f"  {cells[0]:<{widths[0]}}  {ends}".rstrip()


REACH_HEADER = ("topology", "devices", "longest rows", "tokens per device", "of linear", "peak", "host memory")


def reach_rows(sweep: list[Reach]) -> Iterator[tuple[str, ...]]:
    """Yields a row per topology. Linear growth has the tokens per device of the largest topology."""
    most = sweep[-1].found.tokens / sweep[-1].devices
    for each in sweep:
        if not each.found.tokens:
            yield each.topology, f"{each.devices:,}", "none fit", "", "", "", ""
            continue
        need, local = each.found.tried[each.found.tokens], each.found.tokens / each.devices
        share = f"{100 * local / most:.0f} %" if most else "?"
        sizes = ("?" if size is None else bytes_in_words(size) for size in (need.peak, need.host))
        yield each.topology, f"{each.devices:,}", f"{each.found.tokens:,}", f"{local:,.0f}", share, *sizes


def length_rows(found: MaxContext) -> Iterator[tuple[str, ...]]:
    """Yields a row per length tried."""
    for tokens, need in sorted(found.tried.items()):
        sizes = ("?" if size is None else bytes_in_words(size) for size in (need.peak, need.host))
        yield f"{tokens:,}", *sizes, need.refusal or "fits"


def compiled(plan: Plan) -> str:
    """Returns how long the plan took, and the date if it is from the cache."""
    origin = "" if plan.cached is None else f", from the cache of {plan.cached} (--cache False compiles again)"
    return f"compiled in {duration_in_words(plan.compile_seconds)}{origin}"


def verdict(plan: Plan) -> str:
    """Returns 'it fits', or the reason why not."""
    return "it fits" if plan.fits else f"it does not fit: {plan.refusal}"


def memory_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yields the parts of the device's memory, their sum, and the host's memory."""
    device = plan.device_bytes
    for name, size in device.parts.items():
        yield name, bytes_in_words(size)
    limit = "" if device.limit is None else f" of {bytes_in_words(device.limit)}"
    yield "peak", "unknown" if device.peak is None else bytes_in_words(device.peak) + limit
    if plan.host_bytes:
        owned = "" if plan.host_limit is None else f" of {bytes_in_words(plan.host_limit)}"
        yield "host memory", bytes_in_words(plan.host_bytes) + owned


def time_lines(time: StepTime) -> Iterator[tuple[str, str]]:
    """Yields the times of a step and what follows from them."""
    yield "compute", f"{time.compute_seconds:,.3f} s"
    if time.kernel_seconds:
        yield "  of it attention kernels", f"{time.kernel_seconds:,.3f} s"
    yield "  of it device memory", f"{time.hbm_seconds:,.3f} s"
    yield "transfers", f"{time.link_seconds:,.3f} s"
    yield "  of it exposed", f"{time.exposed_seconds:,.3f} s"
    yield "step", f"{time.seconds:,.3f} s"
    yield "utilisation (MFU)", f"{100 * time.utilisation:.1f} %"
    yield "tokens per day", f"{time.tokens_per_day:,.0f}"
    yield "device hours, this run", f"{time.device_hours:,.0f}"
    yield "device hours per 10^9 tokens", f"{time.device_hours_per_billion_tokens:,.0f}"


def write_report(plan: Plan, directory: Path) -> None:
    """Writes plan.json, report.md and the pictures that the plan has. Raises OSError."""
    write_json(directory / "plan.json", plan.to_json())
    write_figure(directory / "plots/memory.png", memory_picture(plan))
    ring = ring_picture(plan)
    if ring is not None:
        write_figure(directory / "plots/ring.png", ring)
    if plan.max_context is not None:
        write_figure(directory / "plots/memory_by_context.png", length_picture(plan, plan.max_context))
    if plan.sweep is not None:
        write_figure(directory / "plots/reach.png", reach_picture(plan.sweep))
    write_text(directory / "report.md", "\n".join(_markdown(plan, ring is not None)) + "\n")


def _markdown(plan: Plan, has_ring: bool) -> Iterator[str]:
    yield f"# Plan for {plan.topology}: {verdict(plan)}"
    size = f"{plan.parameters:,} parameters, rows of {plan.tokens:,} tokens"
    yield f"\n{size}, {math.prod(plan.mesh.values())} of {plan.device_kind}, mesh {describe_sizes(plan.mesh)}"
    if plan.changes:
        yield f"\nTo make it fit, {order(plan.changes)}:\n"
        yield from (f"- {change}" for change in plan.changes)
    yield "\n## Memory per device at the peak\n"
    yield from _table(("part", "size"), memory_lines(plan))
    yield "\n![memory](plots/memory.png)"
    if plan.time is not None:
        yield f"\n## Time per step, by {plan.time.source}\n"
        yield from _table(("figure", "value"), time_lines(plan.time))
    if plan.collectives:
        yield "\n## Transfers per device and step\n"
        yield from _table(HEADER, (row.cells for row in rows(plan.collectives)))
    if has_ring:
        yield "\n![a hop of the ring, forward and backward](plots/ring.png)"
    if plan.ranking:
        yield "\n## Ranking\n"
        yield from (f"- {line}" for line in plan.reasons)
        yield ""
        yield from _table(RANKED, map(ranked_cells, plan.ranking))
    yield from _longest(plan)
    yield f"\nThe step was {compiled(plan)}."


def _longest(plan: Plan) -> Iterator[str]:
    if plan.max_context is not None:
        yield "\n## Longest rows\n"
        yield from _table(("tokens", "peak", "host memory", "result"), length_rows(plan.max_context))
        yield "\n![memory by length](plots/memory_by_context.png)"
    if plan.sweep is not None:
        yield "\n## Longest rows by devices\n"
        yield from _table(REACH_HEADER, reach_rows(plan.sweep))
        yield "\n![longest rows by devices](plots/reach.png)"


def _table(header: tuple[str, ...], body: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    yield from (f"| {' | '.join(cell.strip() for cell in cells)} |" for cells in body)
