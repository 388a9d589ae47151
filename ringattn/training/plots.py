"""The plot of a run: loss by step, and validation loss by number of preceding tokens."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ringattn.palette import BLACK, BLUE, MARKERS, VERMILION
from ringattn.runs.files import write_figure
from ringattn.runs.metrics import Row, stage_ends
from ringattn.training.by_context import losses_by_context

MAX_CURVES = 4
"""Maximum number of validations plotted by context, spread over the run and including the last."""


WINDOW = 0.1
"""Share of the logged steps over which the smoothed training loss is a mean."""


def plot_loss(rows: list[Row], path: Path, name: str) -> None:
    """Plots training and validation loss by step, and validation loss by context, as a PNG for the run `name`.

    The training loss is plotted raw and smoothed. Dotted lines mark the ends of stages. Without a validation of several
    context ranges, the second plot is omitted.
    """
    validations = [row for row in rows if losses_by_context(row)]
    if all(len(losses_by_context(row)) == 1 for row in validations):
        validations = []
    figure = Figure(figsize=(11, 4.2) if validations else (7, 4.2), layout="constrained")
    figure.suptitle(f"Loss of run {name}")
    axes = figure.subplots(1, 2 if validations else 1, squeeze=False)[0]
    _by_step(axes[0], rows)
    if validations:
        axes[0].set_title("by step")
        axes[1].set_title("by context")
        _by_context(axes[1], validations)
    write_figure(path, figure)


def _by_step(axes: Axes, rows: list[Row]) -> None:
    ends = stage_ends(rows)
    points = _points(rows, "loss")
    half = int(WINDOW * len(points)) // 2
    if half:
        axes.plot(*zip(*points, strict=True), color=BLUE, alpha=0.3, label="training")
    # Stages differ in data and loss, so a mean never extends over two.
    pieces = [[point for point in points if bisect_left(ends, point[0]) == stage] for stage in range(len(ends) + 1)]
    smoothed = [running_mean([loss for _, loss in piece], half) for piece in pieces]
    label = f"training, mean of {2 * half + 1} logged steps" if half else "training"
    marker = "o" if len(points) == 1 else None  # a line through one point is invisible
    axes.plot(
        [step for step, _ in points], np.concatenate(smoothed), color=BLUE, linewidth=2, marker=marker, label=label
    )
    axes.plot(
        *zip(*_points(rows, "eval/loss"), strict=True), color=VERMILION, marker="o", markersize=4, label="validation"
    )
    for number, step in enumerate(ends):
        axes.axvline(step, color=BLACK, alpha=0.6, linestyle=":", label="end of a stage" if number == 0 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()


def _points(rows: list[Row], key: str) -> list[tuple[int, float]]:
    """Returns (step, value) of each row that has a value."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def running_mean(values: list[float], half: int) -> np.ndarray:
    """Returns the mean of each value, the `half` values before it and the `half` values after it.

    Unlike an exponential moving average, it does not lag behind a falling loss. Near the start, where the loss falls
    fastest, it takes equally many values on both sides; near the end, it takes those that there are.
    """
    sums, count = np.cumsum([0.0, *values]), len(values)
    index = np.arange(count)
    before, after = np.minimum(half, index), np.minimum(np.minimum(half, index), count - 1 - index)
    return (sums[index + after + 1] - sums[index - before]) / (before + 1 + after)


def _by_context(axes: Axes, validations: list[Row]) -> None:
    chosen = validations[:: -(-len(validations) // MAX_CURVES)]
    if chosen[-1] is not validations[-1]:
        chosen = [*chosen[: MAX_CURVES - 1], validations[-1]]
    # Ranges double in size, so equally spaced ticks make a logarithmic axis.
    ranges = sorted({key for row in chosen for key in losses_by_context(row)})
    for index, row in enumerate(chosen, 1):
        losses: dict[Any, float] = losses_by_context(row)
        ticks = [ranges.index(key) for key in losses]
        color = to_rgba(VERMILION, index / len(chosen))  # later validations are more opaque
        axes.plot(ticks, list(losses.values()), marker=MARKERS[index - 1], color=color, label=f"step {row['step']:,}")
    axes.set_xticks(range(len(ranges)), [f"{first:,}" for first, _ in ranges], rotation=45, ha="right")
    axes.set(xlabel="preceding tokens of the document (at least)", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
