"""Counted cycles as tables on the screen and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ringattn.benchmark.kernel_rows import KernelRow
from ringattn.palette import BLUE, GREEN, ORANGE
from ringattn.runs.files import write_figure


class ProgramRow(TypedDict):
    """One compiled program on one device. All numbers but `utilisation` are cycles."""

    topology: str
    program: str
    ideal: float
    """Useful FLOPs at the peak of the matrix units; a backward pass counts twice a forward pass."""
    xla: float
    kernels: float
    """Cycles of Pallas kernels; 0 for a program without."""
    cycles: float
    """Sum of `xla` and `kernels`."""
    utilisation: float
    visible: float | None
    """Cycles of the visited tiles alone, without masks; None without Pallas kernels."""


def kernel_table(rows: Sequence[KernelRow]) -> Table:
    """One line per hop of a kernel."""
    shown = Table(title="one hop of one device, in thousands of cycles", title_justify="left")
    for header in ("chip", "kernel", "mask"):
        shown.add_column(header, no_wrap=True)
    for header in ("head dim", "pass", "ideal", "cycles", "utilisation", "masked / full tile", "cycles / splash"):
        shown.add_column(header, justify="left" if header == "pass" else "right")
    previous = None
    for row in rows:
        group = row["head_dim"], row["kernel"]
        if previous not in (None, group):
            shown.add_section()
        previous = group
        numbers = f"{row['ideal'] / 1e3:,.0f}", f"{row['cycles'] / 1e3:,.0f}", f"{row['utilisation']:.3f}"
        ratios = ("-" if ratio is None else f"{ratio:.2f}" for ratio in (row["partial"], row["splash"]))
        names = row["topology"].split(":")[0], row["kernel"], row["mask"], str(row["head_dim"]), row["direction"]
        shown.add_row(*names, *numbers, *ratios)
    return shown


def program_table(rows: Sequence[ProgramRow]) -> Table:
    """One line per program."""
    shown = Table(title="compiled programs on one device, in millions of cycles", title_justify="left")
    for header in ("topology", "program"):
        shown.add_column(header, no_wrap=True)
    for header in ("ideal", "XLA", "kernels", "all", "utilisation", "all / visible tiles"):
        shown.add_column(header, justify="right")
    for row in rows:
        numbers = (f"{each / 1e6:,.2f}" for each in (row["ideal"], row["xla"], row["kernels"], row["cycles"]))
        ratio = "-" if not row["visible"] else f"{row['cycles'] / row['visible']:.2f}"
        shown.add_row(row["topology"], row["program"], *numbers, f"{row['utilisation']:.3f}", ratio)
    return shown


def plot(kernels: Sequence[KernelRow], programs: Sequence[ProgramRow], path: Path) -> None:
    """Plots the utilisation of the matrix units as a PNG: kernels by mask and head dim, and programs."""
    figure = Figure(figsize=(13, 4.8 + 0.45 * len(programs)), layout="constrained")
    heights = (4.2, 0.9 + 0.45 * len(programs))
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = parts[0].subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        _draw_kernels(axes, [row for row in kernels if row["direction"] == direction], direction)
    panels[0].set_ylabel("utilisation of the matrix units")
    handles, labels = panels[0].get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside upper right", ncols=len(labels))
    parts[0].suptitle(f"Kernels, one hop on {kernels[0]['topology'].split(':')[0]}" if kernels else "Kernels")
    if programs:
        _draw_programs(parts[1].subplots(), programs)
    write_figure(path, figure)


def _draw_kernels(axes: Axes, rows: Sequence[KernelRow], direction: str) -> None:
    cells = list(dict.fromkeys((row["mask"], row["head_dim"]) for row in rows))
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    width = 0.8 / max(len(names), 1)
    for number, (name, colour) in enumerate(zip(names, (BLUE, ORANGE, GREEN), strict=False)):
        found = {(row["mask"], row["head_dim"]): row["utilisation"] for row in rows if row["kernel"] == name}
        places = np.array([place for place, cell in enumerate(cells) if cell in found]) + (number - 0.5) * width
        heights = [found[cell] for cell in cells if cell in found]
        bars = axes.bar(places, heights, width, label=name, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(cells)), ["\n".join([*mask.split(), f"D={dim}"]) for mask, dim in cells], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="dotted")
    axes.set(title=direction)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _draw_programs(axes: Axes, rows: Sequence[ProgramRow]) -> None:
    labels = [f"{row['program']}\n{row['topology']}" for row in rows]
    bars = axes.barh(range(len(rows)), [row["utilisation"] for row in rows], color=BLUE)
    axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=3)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Programs", xlabel="useful FLOPs relative to the peak of the matrix units", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
