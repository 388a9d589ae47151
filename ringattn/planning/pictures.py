"""Pictures of a plan: the parts of the memory, and a hop of the ring as a timeline."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ringattn.palette import BLUE, COLOURS, GREEN, VERMILION
from ringattn.planning.compile import Plan
from ringattn.planning.longest import MaxContext, Reach
from ringattn.planning.schedule import Collective

GIB = 2**30


def memory_picture(plan: Plan) -> Figure:
    """Returns the parts of the device's memory at the peak as one bar, and its limit as a line."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for colour, (name, size) in zip(COLOURS, plan.device_bytes.parts.items(), strict=False):
        axes.barh(0, size / GIB, left=left, color=colour, label=f"{name} {size / GIB:.2f}")
        left += size / GIB
    if plan.device_bytes.limit is not None:
        axes.axvline(plan.device_bytes.limit / GIB, color="black", linestyle="--", label="limit")
    axes.set(yticks=[], xlabel="GiB per device", title=f"{plan.tokens:,} tokens on {plan.topology}")
    figure.legend(ncols=4, fontsize="small", loc="outside lower center")
    return figure


def hop_of(collectives: list[Collective], part: str) -> list[Collective]:
    """Returns the transfers of a hop inside the loop of the ring: those that run most often."""
    hops = [each for each in collectives if each.part == part and each.link_seconds is not None]
    most = max((each.count for each in hops), default=0)
    return [each for each in hops if each.count == most]


def ring_picture(plan: Plan) -> Figure | None:
    """Returns a hop of the forward and of the backward pass as timelines; None without a ring or without times."""
    hops = {part: hop_of(plan.collectives, part) for part in ("ring forward", "ring backward")}
    if not all(hops.values()) or plan.time is None:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes, (part, transfers) in zip(figure.subplots(2), hops.items(), strict=True):
        _draw_hop(axes, part, transfers)
    return figure


def _draw_hop(axes: Axes, part: str, transfers: list[Collective]) -> None:
    """Draws the compute of a hop, and below it its transfers, which follow one another on the link."""
    compute = 1e3 * max(each.compute_seconds or 0.0 for each in transfers)
    sends = sorted((each for each in transfers if each.link_seconds), key=lambda each: -each.bytes)
    names, left = [f"compute, {compute:.2f} ms"], 0.0
    axes.barh(0, compute, color=BLUE)
    for row, each in enumerate(sends, 1):
        width = 1e3 * (each.link_seconds or 0.0)
        names.append(f"{each.array}, {width:.2f} ms")
        hidden = min(max(compute - left, 0.0), width)
        axes.barh(row, hidden, left=left, color=GREEN)
        axes.barh(row, width - hidden, left=left + hidden, color=VERMILION)
        left += width
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"one hop, {part}: {'hidden' if left <= compute else 'partly exposed'}")


def length_picture(plan: Plan, found: MaxContext) -> Figure:
    """Returns the memory of the lengths tried, on the device and on the host, with the limits as lines."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    kinds = (
        ("device", BLUE, plan.device_bytes.limit, {length: need.peak for length, need in found.tried.items()}),
        ("host", GREEN, plan.host_limit, {length: need.host for length, need in found.tried.items()}),
    )
    for name, colour, limit, sizes in kinds:
        points = sorted((length, size / GIB) for length, size in sizes.items() if size)
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, label=name)
        for length, size in points:
            fits = found.tried[length].refusal is None
            axes.plot(length, size, color=colour, marker="o" if fits else "x", linestyle="none")
        if limit is not None:
            axes.axhline(limit / GIB, color=colour, linestyle="--", label=f"limit of the {name}")
    title = f"memory by length on {plan.topology} (x: does not fit)"
    axes.set(xlabel="tokens per row", ylabel="GiB per device", title=title, xlim=(0, None), ylim=(0, None))
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend()
    return figure


def reach_picture(sweep: list[Reach]) -> Figure:
    """Returns the longest rows against the number of devices, and linear growth as a line."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    devices = [each.devices for each in sweep]
    most = sweep[-1].found.tokens / devices[-1]
    axes.plot(devices, [most * each for each in devices], color="black", linestyle="--", label="linear")
    found = [(each.devices, each.found.tokens) for each in sweep if each.found.tokens]
    if found:
        axes.plot(*zip(*found, strict=True), color=BLUE, marker="o", label="longest rows that fit")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_yticks([tokens for _, tokens in found], [f"{tokens:,}" for _, tokens in found])
        axes.minorticks_off()
    axes.set_xticks(devices, [each.topology for each in sweep])
    axes.set(xlabel="devices", ylabel="tokens per row", title="longest rows by devices")
    axes.legend()
    return figure
