"""How it is told: a table on the screen, results.json, a plot."""

import json
import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator
from rich.console import Console
from rich.table import Table

from ringattn.units import bytes_in_words

Row = dict[str, Any]
"""What is known of one pass of one subject at one length and ring size; an object of results.json."""


AXES = {"seconds": "time of a call", "temp_bytes": "temporary memory of a device"}


def make_console() -> Console:
    """Of the terminal's width, or wide enough for the tables where there is none."""
    usual = Console(highlight=False)
    return usual if usual.is_terminal else Console(highlight=False, width=160, soft_wrap=True)


def table(rows: list[Row], title: str, baselines: tuple[str, ...]) -> Table:
    """A line a row that was measured: medians, and in brackets the middle half of the rounds."""
    shown = Table(title=title, title_justify="left")
    for header in ("subject", "pass"):
        shown.add_column(header, no_wrap=True)
    for header in ("time", "useful GFLOP/s", "temporary / device"):
        shown.add_column(header, justify="right")
    for baseline in baselines:
        shown.add_column(f"speed / {baseline}", justify="right")
    previous = None
    for row in rows:
        if row["skipped"] is None:
            if previous not in (None, row["pass"]):
                shown.add_section()
            previous = row["pass"]
            numbers = (
                duration(row["seconds"]),
                f"{row['flops_per_second'] / 1e9:,.1f}",
                bytes_in_words(row["temp_bytes"]),
            )
            ratios = [_ratio(row["speed"].get(baseline)) for baseline in baselines]
            shown.add_row(row["subject"], row["pass"], *numbers, *ratios)
    return shown


def _ratio(speed: dict[str, float] | None) -> str:
    return "-" if speed is None else f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"


def skipped(rows: list[Row]) -> list[str]:
    """A line a subject and reason."""
    passes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["skipped"] is not None:
            passes.setdefault((row["subject"], row["skipped"]), []).append(row["pass"])
    return [f"skipped {subject}, {' and '.join(which)}: {reason}" for (subject, reason), which in passes.items()]


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"


def write_json(content: dict[str, Any], path: Path) -> None:
    """The file is there entirely or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draws time and temporary memory as a PNG: against the length and, where there are several, the ring's size.

    Of several rings the largest is drawn against the length; of several numbers of tokens a device the largest is
    drawn against the ring's size.
    """
    ring, shard = max(row["ring"] for row in rows), max(row["shard_tokens"] for row in rows)
    lines = [("length", [row for row in rows if row["ring"] == ring], f"tokens in a row, ring of {ring}")]
    by_ring = [row for row in rows if row["shard_tokens"] == shard]
    if len({row["ring"] for row in by_ring}) > 1:
        lines.append(("ring", by_ring, f"devices in the ring, {shard:,} tokens on each"))
        if len({row["length"] for row in lines[0][1]}) == 1:
            del lines[0]
    panels = (("forward", "seconds"), ("forward+backward", "seconds"), ("forward+backward", "temp_bytes"))
    figure = Figure(figsize=(13, 1.4 + 4 * len(lines)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(lines), len(panels), squeeze=False)
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    for across, (by, chosen, label) in zip(grid, lines, strict=True):
        for axes, (pass_, value) in zip(across, panels, strict=True):
            _draw(axes, [row for row in chosen if row["pass"] == pass_], subjects, by, value)
            axes.set(title=pass_, xlabel=label, ylabel=AXES[value])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, rows: list[Row], subjects: list[str], by: str, value: str) -> None:
    """A line a subject, the same colour and marker in every panel; what was skipped has no point."""
    for number, subject in enumerate(subjects):
        points = [(row[by], row[value]) for row in rows if row["subject"] == subject and row["skipped"] is None]
        points = sorted((x, y) for x, y in points if y > 0)  # a logarithmic axis has no 0
        # Thinner from line to line, so that those below still show where several coincide.
        thin = 1 - number / len(subjects)
        style = {"marker": "osD^vPX*"[number % 8], "markersize": 5 + 6 * thin, "linewidth": 1 + 3 * thin}
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=subject, **style)
    if not axes.has_data() or axes.dataLim.width < 0:
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10 if value == "seconds" else 2)
    ticks = sorted({row[by] for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    if value == "seconds":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g} s" if y >= 1 else f"{y * 1e3:,g} ms")
    else:
        axes.yaxis.set_major_formatter(lambda y, _: bytes_in_words(y))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
