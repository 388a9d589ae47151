"""The plot of a run: loss by step, and validation loss by number of preceding tokens."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ringattn.runs.files import write_figure
from ringattn.runs.metrics import Row, stage_ends
from ringattn.training.by_context import losses_by_context

MAX_CURVES = 4
"""Maximum number of validations plotted by context, spread over the run and including the last."""


def plot_loss(rows: list[Row], path: Path) -> None:
    """Plots training and validation loss by step, and validation loss by context, as a PNG.

    Dotted lines mark the ends of stages. Without a validation of several context ranges, the second plot is omitted.
    """
    validations = [row for row in rows if losses_by_context(row)]
    if all(len(losses_by_context(row)) == 1 for row in validations):
        validations = []
    figure = Figure(figsize=(11, 4) if validations else (7, 4), layout="constrained")
    axes = figure.subplots(1, 2 if validations else 1, squeeze=False)[0]
    _by_step(axes[0], rows)
    if validations:
        _by_context(axes[1], validations)
    write_figure(path, figure)


def _by_step(axes: Axes, rows: list[Row]) -> None:
    for key, label in (("loss", "training"), ("eval/loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True), label=label, marker="." if key.startswith("eval") else None)
    for step in stage_ends(rows):
        axes.axvline(step, color="gray", linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()


def _by_context(axes: Axes, validations: list[Row]) -> None:
    chosen = validations[:: -(-len(validations) // MAX_CURVES)]
    if chosen[-1] is not validations[-1]:
        chosen = [*chosen[: MAX_CURVES - 1], validations[-1]]
    # Ranges double in size, so equally spaced ticks make a logarithmic axis.
    ranges = sorted({key for row in chosen for key in losses_by_context(row)})
    for index, row in enumerate(chosen, 1):
        losses: dict[Any, float] = losses_by_context(row)
        ticks = [ranges.index(key) for key in losses]
        color = to_rgba("tab:orange", index / len(chosen))  # later validations are more opaque
        axes.plot(ticks, list(losses.values()), marker=".", color=color, label=f"step {row['step']:,}")
    axes.set_xticks(range(len(ranges)), [f"{first:,}" for first, _ in ranges], rotation=45, ha="right")
    axes.set(xlabel="preceding tokens of the document (at least)", ylabel="validation loss (nats per token)")
    axes.legend()
