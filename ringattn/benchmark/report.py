"""Results of a benchmark as a table on the screen and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator
from rich.console import Console
from rich.table import Table

from ringattn.palette import COLOURS, MARKERS
from ringattn.runs.files import write_figure
from ringattn.units import bytes_in_words


class Speed(TypedDict):
    """Speed as a multiple of a baseline's: median and quartiles over the rounds."""

    median: float
    low: float
    high: float


Result = TypedDict(
    "Result",
    {
        "length": int,
        "ring": int,
        "shard_tokens": int,
        "subject": str,
        "pass": str,
        "skipped": str | None,
        "seconds": NotRequired[float],
        "samples": NotRequired[list[float]],
        "temp_bytes": NotRequired[int],
        "flops_per_second": NotRequired[float],
        "speed": NotRequired[dict[str, Speed]],
    },
)
"""One pass of one subject at one length and ring size, a row of results.json. If skipped, it has only the reason."""

LABELS = {"seconds": "time per call", "temp_bytes": "temporary memory per device"}

Quantity = Literal["seconds", "temp_bytes"]
Abscissa = Literal["length", "ring"]


def make_console() -> Console:
    """Console of the terminal's width; wide enough for the tables if the output is not a terminal."""
    # With markup, rich would remove '[benchmark]' from a printed "pip install -e '.[benchmark]'".
    terminal = Console(highlight=False, markup=False)
    return terminal if terminal.is_terminal else Console(highlight=False, markup=False, width=160, soft_wrap=True)


def table(results: Sequence[Result], title: str, baselines: tuple[str, ...]) -> Table:
    """One line per measured result: medians, and the quartiles of the speed in brackets."""
    shown = Table(title=title, title_justify="left")
    for header in ("subject", "pass"):
        shown.add_column(header, no_wrap=True)
    for header in ("time", "useful GFLOP/s", "temporary / device"):
        shown.add_column(header, justify="right")
    for baseline in baselines:
        shown.add_column(f"speed / {baseline}", justify="right")
    previous = None
    for result in results:
        if "seconds" in result and "flops_per_second" in result and "temp_bytes" in result and "speed" in result:
            if previous not in (None, result["pass"]):
                shown.add_section()
            previous = result["pass"]
            numbers = (
                duration(result["seconds"]),
                f"{result['flops_per_second'] / 1e9:,.1f}",
                bytes_in_words(result["temp_bytes"]),
            )
            ratios = [_ratio(result["speed"].get(baseline)) for baseline in baselines]
            shown.add_row(result["subject"], result["pass"], *numbers, *ratios)
    return shown


def _ratio(speed: Speed | None) -> str:
    return "-" if speed is None else f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"


def skipped(results: Sequence[Result]) -> list[str]:
    """One line per skipped subject and reason."""
    passes: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result["skipped"] is not None:
            passes.setdefault((result["subject"], result["skipped"]), []).append(result["pass"])
    return [f"skipped {subject}, {' and '.join(names)}: {reason}" for (subject, reason), names in passes.items()]


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Plots time and temporary memory as a PNG, against the length and, for several ring sizes, the ring size.

    The plots against the length show the largest ring; those against the ring size show the most tokens per device.
    Skipped subjects are left out.
    """
    ring, shard = max(result["ring"] for result in results), max(result["shard_tokens"] for result in results)
    largest_ring = [result for result in results if result["ring"] == ring]
    most_tokens = [result for result in results if result["shard_tokens"] == shard]
    rows: list[tuple[Abscissa, list[Result], str]] = [
        ("length", largest_ring, f"tokens per row, ring of {ring} devices"),
        ("ring", most_tokens, f"devices of the ring, {shard:,} tokens per device"),
    ]
    if len({result["ring"] for result in most_tokens}) == 1:
        del rows[1]
    elif len({result["length"] for result in largest_ring}) == 1:
        del rows[0]
    columns: tuple[tuple[str, Quantity], ...] = (
        ("forward", "seconds"),
        ("forward+backward", "seconds"),
        ("forward+backward", "temp_bytes"),
    )
    figure = Figure(figsize=(13, 1.4 + 4 * len(rows)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    subjects = list(dict.fromkeys(result["subject"] for result in results if result["skipped"] is None))
    for panels, (by, chosen, label) in zip(grid, rows, strict=True):
        for axes, (pass_, quantity) in zip(panels, columns, strict=True):
            _draw(axes, [result for result in chosen if result["pass"] == pass_], subjects, by, quantity)
            axes.set(title=pass_, xlabel=label, ylabel=LABELS[quantity])
    # A subject without a point in any panel, because it is skipped for the rings and lengths shown, gets no entry.
    drawn = {line.get_label(): line for axes in grid.flat for line in axes.lines if len(line.get_xdata())}
    shown = [subject for subject in subjects if subject in drawn]
    if shown:
        handles = [drawn[subject] for subject in shown]
        figure.legend(handles, shown, loc="outside lower center", ncols=min(len(shown), 4))
    write_figure(path, figure)


def _draw(axes: Axes, results: Sequence[Result], subjects: list[str], by: Abscissa, quantity: Quantity) -> None:
    """One line per subject, with the same colour and marker in every panel."""
    for number, subject in enumerate(subjects):
        points = sorted((result[by], result.get(quantity, 0)) for result in results if result["subject"] == subject)
        points = [(x, y) for x, y in points if y > 0]  # a logarithmic axis has no 0
        # Later lines are thinner, so that earlier ones stay visible where several coincide.
        thickness = 1 - number / len(subjects)
        axes.plot(
            *zip(*points, strict=True) if points else ([], []),
            label=subject,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5 + 6 * thickness,
            linewidth=1 + 3 * thickness,
        )
    if not axes.has_data() or axes.dataLim.width < 0:
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10 if quantity == "seconds" else 2)
    ticks = sorted({result[by] for result in results})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    if quantity == "seconds":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g} s" if y >= 1 else f"{y * 1e3:,g} ms")
    else:
        axes.yaxis.set_major_formatter(lambda y, _: bytes_in_words(y))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
