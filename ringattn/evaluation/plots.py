"""Plots of an evaluation: heat maps of exact match by length and depth, exact match by length, loss curves."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ringattn.config import LOSSES
from ringattn.evaluation.losses import changes
from ringattn.evaluation.results import Result, score_name
from ringattn.palette import COLOURS, MARKERS
from ringattn.runs.files import write_figure

Runs = dict[str, list[Result]]
"""Results by the name of the run."""
LINES = ("-", "--", ":", "-.")
LENGTH_LABEL = "tokens per row"
LOSS_LABEL = "loss (nats per token)"
FIRST_TOKENS = 128
"""Number of tokens at the start of a row that do not scale the axis of losses."""


def write_plots(runs: Runs, directory: Path) -> None:
    """Writes a PNG for each task with depths and for each loss, and retrieval.png for the other retrieval tasks."""
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.png"):  # otherwise plots of tasks that are no longer evaluated would remain
        old.unlink()
    results = [result for run_results in runs.values() for result in run_results]
    for task in dict.fromkeys(result["task"] for result in results if result["depth"] is not None):
        write_figure(directory / f"{task}.png", heat_maps(runs, task))
    without_depth = (result["task"] for result in results if result["depth"] is None and "rate" in result)
    if tasks := list(dict.fromkeys(without_depth)):
        write_figure(directory / "retrieval.png", exact_match(runs, tasks))
    for task, plot in zip(LOSSES, (by_position, by_context, by_kind), strict=True):
        if any(result["task"] == task for result in results):
            write_figure(directory / f"{task}.png", plot(runs))


def _of_task(results: list[Result], task: str) -> list[Result]:
    return [result for result in results if result["task"] == task]


def heat_maps(runs: Runs, task: str) -> Figure:
    """Exact match or score by length (x) and depth (y), one map per run, with the number in each cell."""
    first_run = _of_task(next(iter(runs.values())), task)
    lengths, depths = (list(dict.fromkeys(result[name] for result in first_run)) for name in ("length", "depth"))
    width, height = 1.6 + 0.9 * len(lengths), 1.8 + 0.45 * len(depths)
    figure = Figure(figsize=(max(width, 3.6) * len(runs) + 0.8, max(height, 3)), layout="constrained")
    maps = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    image = None
    for axes, (run, results) in zip(maps, runs.items(), strict=True):
        rates = {(result["length"], result["depth"]): result["rate"] for result in _of_task(results, task)}
        grid = np.array([[rates[length, depth] for length in lengths] for depth in depths])
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            colour = "white" if value < 0.6 else "black"  # viridis is dark at 0 and light at 1
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=10, color=colour)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel=LENGTH_LABEL, title=f"task {task}, run {run}")
    maps[0].set_ylabel("depth (100%: just before the question)")
    assert image is not None
    figure.colorbar(image, ax=list(maps), label=score_name(first_run[0]))
    return figure


def _line_plot(runs: Runs, title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=_title(runs, title), ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _title(runs: Runs, title: str) -> str:
    """Returns `title`, with a second line if there is only one run. The legend names several."""
    return f"{title}\nrun {next(iter(runs))}" if len(runs) == 1 else title


def _log_ticks(axes: Axes, ticks: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _line_style(series: int, line: int) -> dict[str, Any]:
    """Colour and marker number `series`, line style number `line`."""
    colour, marker = COLOURS[series % len(COLOURS)], MARKERS[series % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linestyle": LINES[line % len(LINES)]}


def _legend(axes: Axes) -> None:
    """A legend to the right of the plot, where it covers no data."""
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def exact_match(runs: Runs, tasks: list[str]) -> Figure:
    """Exact match or score by length, with 95 % intervals: one colour and marker per task, one line style per run."""
    name = score_name(_of_task(next(iter(runs.values())), tasks[0])[0])
    figure, axes = _line_plot(runs, f"{name.capitalize()} by length", f"{name} (bars: 95% interval)")
    all_lengths: set[int] = set()
    for number, (run, results) in enumerate(runs.items()):
        for task_number, task in enumerate(tasks):
            of_task = _of_task(results, task)
            lengths, rates = [result["length"] for result in of_task], np.array([result["rate"] for result in of_task])
            errors = [rates - [result["low"] for result in of_task], [result["high"] for result in of_task] - rates]
            label = f"{task}, {run}" if len(runs) > 1 else task
            axes.errorbar(lengths, rates, np.abs(errors), label=label, capsize=3, **_line_style(task_number, number))
            all_lengths |= set(lengths)
    axes.set_ylim(-0.05, 1.05)
    _log_ticks(axes, sorted(all_lengths), LENGTH_LABEL)
    _legend(axes)
    return figure


def by_position(runs: Runs) -> Figure:
    """Loss by position in the row: one colour and marker per length, or per run if there is one length.

    Each run has a line style. The loss of the first tokens, which is large and noisy, may exceed the axis.
    """
    figure, axes = _line_plot(runs, "Loss by position in the row", LOSS_LABEL)
    ticks, highest = set(), []
    one_length = len({result["length"] for results in runs.values() for result in _of_task(results, LOSSES[0])}) == 1
    for number, (run, results) in enumerate(runs.items()):
        for length_number, result in enumerate(_of_task(results, LOSSES[0])):
            ranges = result["by_position"]
            centres = [np.sqrt((part["first"] + 1) * (part["last"] + 1)) for part in ranges]
            loss, error = (np.array([part[name] for part in ranges], float) for name in ("loss", "error"))
            label = f"{run}, " * (len(runs) > 1) + f"{result['length']:,} tokens per row"
            line = _line_style(number if one_length else length_number, number)
            axes.plot(centres, loss, label=label, **line)
            axes.fill_between(centres, loss - error, loss + error, alpha=0.2, color=line["color"], linewidth=0)
            ticks |= {2**power for power in range(result["length"].bit_length())}
            highest += [part["loss"] for part in ranges if part["first"] >= FIRST_TOKENS]
    if highest:
        axes.set_ylim(0, 1.3 * max(highest))
    _log_ticks(axes, sorted(ticks)[::2], "position in the row, from 1 (shaded: standard error over documents)")
    _legend(axes)
    return figure


def by_context(runs: Runs) -> Figure:
    """Change of the loss of the same tokens by length, relative to the shortest rows, one line per run."""
    scored = _of_task(next(iter(runs.values())), LOSSES[1])[0]["scored"]
    title = f"Loss of the same {scored:,} tokens at the end of longer rows"
    figure, axes = _line_plot(runs, title, "change in loss (nats per token)")
    all_lengths: set[int] = set()
    for number, (run, results) in enumerate(runs.items()):
        of_task = _of_task(results, LOSSES[1])
        lengths, means = [result["length"] for result in of_task], changes(of_task)
        errors = np.array([mean["error"] for mean in means], float)  # NaN without an error
        label = f"{run}\nloss {of_task[lengths.index(min(lengths))]['loss']:.4f} at {min(lengths):,} tokens"
        axes.errorbar(
            lengths, [mean["loss"] for mean in means], errors, capsize=3, label=label, **_line_style(number, number)
        )
        all_lengths |= set(lengths)
    _log_ticks(axes, sorted(all_lengths), f"{LENGTH_LABEL}; bars: standard error over documents")
    _legend(axes)
    return figure


def by_kind(runs: Runs) -> Figure:
    """Loss of each kind of document in the longest rows, one bar per run."""
    longest = {
        run: max(_of_task(results, LOSSES[2]), key=lambda result: result["length"]) for run, results in runs.items()
    }
    kinds = list(dict.fromkeys(part["kind"] for result in longest.values() for part in result["kinds"]))
    figure = Figure(figsize=(max(5.0, 2.5 + 0.8 * len(kinds)), 4), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(runs)
    for number, (run, result) in enumerate(longest.items()):
        losses = {part["kind"]: part["loss"] for part in result["kinds"]}
        ticks = [tick + number * width for tick, kind in enumerate(kinds) if kind in losses]
        heights = [losses[kind] for kind in kinds if kind in losses]
        axes.bar(ticks, heights, width, label=run, color=COLOURS[number % len(COLOURS)])
    axes.set_xticks([tick + 0.4 - width / 2 for tick in range(len(kinds))], kinds, rotation=30, ha="right")
    length = max(result["length"] for result in longest.values())
    axes.set(ylabel=LOSS_LABEL, title=_title(runs, f"Loss by kind of document in rows of {length:,} tokens"))
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    if len(runs) > 1:
        _legend(axes)
    return figure
