"""Memory against tokens and devices, how far it reaches, and the law of overlap by chip, as matplotlib figures."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

from ringattn.units import bytes_in_words
from ringattn.visualize.figures import DPI, INK
from ringattn.visualize.memory import SHOWN, Curve
from ringattn.visualize.svg import COLOURS

SIZE = 7.6, 4.2
"""Inches."""
MARKERS = "osD^vPX*"
DASHES = (5, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (10, 3)
"""By which horizontal lines are told apart."""


def memory_figure(
    curves: Mapping[str, Curve], label: str, marks: Mapping[str, float | int] | None = None, logarithmic: bool = True
) -> Figure:
    """Bytes of a device against tokens or devices, as `label` says.

    Args:
      curves: {strategy, or other name of a line: {tokens or devices: bytes}}.
      label: of the horizontal axis.
      marks: {name: bytes} of horizontal lines, such as what a chip has.
      logarithmic: both axes, so that a line's slope is the power; else both are linear.
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
    _label_points(axes, curves)
    axes.yaxis.set_major_formatter(lambda y, _: bytes_in_words(y))
    axes.set(xlabel=label, ylabel="temporary memory of a device")
    axes.legend(fontsize=9, loc="lower right")
    return figure


def reach_figure(reached: Mapping[str, Curve], asked: int, title: str) -> Figure:
    """Tokens of the longest row against devices, both logarithmic: {strategy: {devices: tokens}}.

    Lines are solid up to `asked` devices, for which programs were compiled, and dashed where the law alone speaks.
    """
    figure = Figure(figsize=SIZE, layout="constrained", dpi=DPI)
    axes = figure.subplots()
    for name, curve in reached.items():
        known = [devices for devices in curve if devices <= asked]
        beyond = [devices for devices in curve if devices >= asked]
        style = _style(name, reached)
        axes.plot(known, [curve[devices] for devices in known], label=name, **style)
        axes.plot(beyond, [curve[devices] for devices in beyond], color=style["color"], linewidth=2.5, linestyle="--")
    axes.plot([], [], color=INK, linestyle="--", label=f"beyond {asked} devices: the law alone")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _label_points(axes, reached)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set(xlabel="devices", ylabel="tokens of the longest row", title=title)
    axes.legend(fontsize=9, loc="upper left")
    return figure


def _style(name: str, names: Mapping[str, Curve]) -> dict[str, Any]:
    """The same for a strategy in every figure."""
    number = [*SHOWN, *(each for each in names if each not in SHOWN)].index(name)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 2.5, "markersize": 7}


def _label_points(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """The horizontal axis has a label wherever there are points, and no other."""
    axes.xaxis.set_major_locator(FixedLocator(sorted({x for curve in curves.values() for x in curve})))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def overlap_figure(least: Mapping[str, Mapping[str, float | int]]) -> Figure:
    """Bars of {chip: {kind of work: tokens a device from which on a hop hides its transfer}}, of the same kinds."""
    kinds = list(next(iter(least.values())))
    figure = Figure(figsize=(SIZE[0], 1.3 + 0.24 * len(kinds) * len(least)), layout="constrained", dpi=DPI)
    axes, height = figure.subplots(), 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        tokens = [of[kind] for of in least.values()]
        places = [place + (number - (len(kinds) - 1) / 2) * height for place in range(len(least))]
        bars = axes.barh(places, tokens, 0.9 * height, color=COLOURS[(number + 1) % len(COLOURS)], label=kind)
        axes.bar_label(bars, [f"{each:,.0f}" for each in tokens], padding=3, fontsize=9)
    axes.set_yticks(range(len(least)), list(least))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("tokens a device, from which on a hop hides its transfer")
    axes.legend(fontsize=9)
    return figure
