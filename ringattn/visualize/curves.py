"""Matplotlib figures of memory, of the longest row that fits, and of the local tokens that overlap requires."""

from collections.abc import Mapping
from typing import TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

from ringattn.palette import MARKERS
from ringattn.units import bytes_in_words
from ringattn.visualize.attention_memory import STRATEGIES, Curve
from ringattn.visualize.figures import DPI, INK
from ringattn.visualize.svg import COLOURS

SIZE = 7.6, 4.2
"""Inches."""
DASHES = (5, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (10, 3)
"""Dash patterns of horizontal lines."""


class Style(TypedDict):
    """Keyword arguments of `Axes.plot`."""

    color: str
    marker: str
    linewidth: float
    markersize: float


def memory_figure(
    curves: Mapping[str, Curve], label: str, marks: Mapping[str, float | int] | None = None, logarithmic: bool = True
) -> Figure:
    """Temporary bytes per device against tokens or devices.

    Args:
      curves: {strategy, or other name of a line: {tokens or devices: bytes}}.
      label: label of the horizontal axis.
      marks: {name: bytes} of horizontal lines, such as the memory of a chip.
      logarithmic: makes both axes logarithmic, so that the slope of a line is its exponent; otherwise both are linear.
    """
    figure = Figure(figsize=SIZE, layout="constrained", dpi=DPI)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=name, **_style(name, curves))
    for number, (name, amount) in enumerate((marks or {}).items()):
        axes.axhline(amount, color=INK, linewidth=1, dashes=DASHES[number % len(DASHES)], label=name)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        most = max(max(curve.values()) for curve in curves.values())
        axes.yaxis.set_major_locator(MultipleLocator(2.0 ** (int(most).bit_length() - 3)))
        axes.set_ylim(0, 1.1 * most)
    _tick_at_points(axes, curves)
    axes.yaxis.set_major_formatter(lambda y, _: bytes_in_words(y))
    axes.set(xlabel=label, ylabel="temporary memory per device", title="Attention, forward and backward")
    axes.legend(fontsize=9, loc="lower right")
    return figure


def reach_figure(reach: Mapping[str, Curve], compiled_devices: int, title: str) -> Figure:
    """Tokens of the longest row against devices, both logarithmic: {strategy: {devices: tokens}}.

    Lines are solid up to `compiled_devices`, for which programs were compiled, and dashed where the law extrapolates.
    """
    figure = Figure(figsize=SIZE, layout="constrained", dpi=DPI)
    axes = figure.subplots()
    for name, curve in reach.items():
        compiled = [devices for devices in curve if devices <= compiled_devices]
        beyond = [devices for devices in curve if devices >= compiled_devices]
        style = _style(name, reach)
        axes.plot(compiled, [curve[devices] for devices in compiled], label=name, **style)
        axes.plot(beyond, [curve[devices] for devices in beyond], color=style["color"], linewidth=2.5, linestyle="--")
    axes.plot([], [], color=INK, linestyle="--", label=f"beyond {compiled_devices} devices: extrapolated by the law")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _tick_at_points(axes, reach)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set(xlabel="devices", ylabel="tokens of the longest row", title=title)
    axes.legend(fontsize=9, loc="upper left")
    return figure


def _style(name: str, names: Mapping[str, Curve]) -> Style:
    """Colour and marker of a line, the same for a strategy in every figure."""
    number = [*STRATEGIES, *(other for other in names if other not in STRATEGIES)].index(name)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 2.5, "markersize": 7}


def _tick_at_points(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Labels the horizontal axis at every point of the curves, and nowhere else."""
    axes.xaxis.set_major_locator(FixedLocator(sorted({x for curve in curves.values() for x in curve})))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def overlap_figure(min_tokens: Mapping[str, Mapping[str, float | int]]) -> Figure:
    """Bars of {chip: {kind of work: minimum local tokens for a hop to hide its transfer}}; all chips have all kinds."""
    kinds = list(next(iter(min_tokens.values())))
    figure = Figure(figsize=(SIZE[0], 1.5 + 0.24 * len(kinds) * len(min_tokens)), layout="constrained", dpi=DPI)
    axes, height = figure.subplots(), 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        tokens = [by_kind[kind] for by_kind in min_tokens.values()]
        offset = (number - (len(kinds) - 1) / 2) * height
        centres = [chip + offset for chip in range(len(min_tokens))]
        bars = axes.barh(centres, tokens, 0.9 * height, color=COLOURS[(number + 1) % len(COLOURS)], label=kind)
        axes.bar_label(bars, [f"{count:,.0f}" for count in tokens], padding=3, fontsize=9)
    axes.set_yticks(range(len(min_tokens)), list(min_tokens))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="local tokens", title="Minimum local tokens for a hop to hide its transfer")
    axes.legend(fontsize=9)
    return figure
