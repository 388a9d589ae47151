"""The picture of a run: its losses over the steps, and over how much context a token has."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ringattn.training.by_context import losses_by_context
from ringattn.training.metrics import Row, stage_ends

SHOWN = 4
"""Evaluations whose losses by context are drawn, from the first to the last."""


def plot_loss(rows: list[Row], path: Path) -> None:
    """Draws training and validation loss over the steps, and beside it validation loss by context, as a PNG.

    Where a stage ends and the next begins is a line. Of a single range of contexts there is no picture.
    """
    evaluations = [row for row in rows if losses_by_context(row)]
    if all(len(losses_by_context(row)) == 1 for row in evaluations):
        evaluations = []
    figure = Figure(figsize=(11, 4) if evaluations else (7, 4), layout="constrained")
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    _by_step(axes[0], rows)
    if evaluations:
        _by_context(axes[1], evaluations)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def _by_step(axes: Axes, rows: list[Row]) -> None:
    for key, label in (("loss", "training"), ("eval/loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label=label, marker="." if key.startswith("eval") else None)
    for step in stage_ends(rows):
        axes.axvline(step, color="gray", linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()


def _by_context(axes: Axes, evaluations: list[Row]) -> None:
    chosen = evaluations[:: -(-len(evaluations) // SHOWN)]
    if chosen[-1] is not evaluations[-1]:
        chosen = [*chosen[: SHOWN - 1], evaluations[-1]]
    # Places of equal width: the ranges double, so this is a logarithmic axis.
    ranges = sorted({each for row in chosen for each in losses_by_context(row)})
    for number, row in enumerate(chosen, 1):
        losses: dict[Any, float] = losses_by_context(row)
        places = [ranges.index(each) for each in losses]
        color = to_rgba("tab:orange", number / len(chosen))  # the later, the stronger; validation's colour
        axes.plot(places, list(losses.values()), marker=".", color=color, label=f"step {row['step']:,}")
    axes.set_xticks(range(len(ranges)), [f"{first:,}" for first, _ in ranges], rotation=45, ha="right")
    axes.set(xlabel="context (tokens of the document before, at least)", ylabel="validation loss (nats per token)")
    axes.legend()
