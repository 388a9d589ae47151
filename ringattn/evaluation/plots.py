"""Pictures of an evaluation: heat maps of what is found at which depth, rates by length, losses as curves."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ringattn.config import LOSSES
from ringattn.evaluation.losses import changes

Results = dict[str, list[dict[str, Any]]]
"""Of each run, by its name."""


def draw(runs: Results, folder: Path) -> None:
    """Writes <task>.png for each task with depths, retrieval.png for all others; loss_by_position.png and so on."""
    folder.mkdir(exist_ok=True)
    for earlier in folder.glob("*.png"):  # of tasks that are no longer asked
        earlier.unlink()
    found = [each for results in runs.values() for each in results]
    for task in dict.fromkeys(each["task"] for each in found if each["depth"] is not None):
        _save(heat_maps(runs, task), folder / f"{task}.png")
    flat = list(dict.fromkeys(each["task"] for each in found if each["depth"] is None and "rate" in each))
    if flat:
        _save(rates(runs, flat), folder / "retrieval.png")
    for task, figure in zip(LOSSES, (by_position, by_context, by_kind), strict=True):
        if any(each["task"] == task for each in found):
            _save(figure(runs), folder / f"{task}.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)


def _of(results: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    return [each for each in results if each["task"] == task]


def heat_maps(runs: Results, task: str) -> Figure:
    """Exact match by length (across) and depth (down), a map a run, each cell with its number."""
    first = _of(next(iter(runs.values())), task)
    lengths, depths = (list(dict.fromkeys(each[name] for each in first)) for name in ("length", "depth"))
    width, height = 1.6 + 0.9 * len(lengths), 1.8 + 0.45 * len(depths)
    figure = Figure(figsize=(max(width, 3.6) * len(runs) + 0.8, max(height, 3)), layout="constrained")
    row = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    image = None
    for axes, (run, results) in zip(row, runs.items(), strict=True):
        rate = {(each["length"], each["depth"]): each["rate"] for each in _of(results, task)}
        grid = np.array([[rate[length, depth] for length in lengths] for depth in depths])
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (line, column), value in np.ndenumerate(grid):
            color = "black" if 0.12 < value < 0.88 else "white"  # the map is dark at both ends
            axes.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=10, color=color)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="tokens in the row", title=f"task {task}, run {run}")
    row[0].set_ylabel("depth (100 %: just before the question)")
    assert image is not None
    figure.colorbar(image, ax=list(row), label="exact match")
    return figure


def _lines(runs: Results, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _lengths(axes: Axes, lengths: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(label)


def rates(runs: Results, tasks: list[str]) -> Figure:
    """Exact match over length, with 95 % intervals; a line a task and run."""
    figure, axes = _lines(runs, "exact match")
    lengths: set[int] = set()
    for number, (run, results) in enumerate(runs.items()):
        for color, task in enumerate(tasks):
            own = _of(results, task)
            across, rate = [each["length"] for each in own], np.array([each["rate"] for each in own])
            spread = [rate - [each["low"] for each in own], [each["high"] for each in own] - rate]
            label = f"{task}, {run}" if len(runs) > 1 else task
            line = ("-", "--", ":", "-.")[number % 4]
            axes.errorbar(
                across, rate, np.abs(spread), label=label, capsize=3, color=f"C{color}", linestyle=line, marker="."
            )
            lengths |= set(across)
    axes.set_ylim(-0.05, 1.05)
    _lengths(axes, sorted(lengths), "tokens in the row")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def by_position(runs: Results) -> Figure:
    """Loss over the position in the row; a line a run and length."""
    figure, axes = _lines(runs, "loss (nats per token)")
    ends = set()
    for run, results in runs.items():
        for result in _of(results, LOSSES[0]):
            ranges = result["by_position"]
            middles = [np.sqrt((each["first"] + 1) * (each["last"] + 1)) for each in ranges]
            loss, error = (np.array([each[name] for each in ranges], float) for name in ("loss", "error"))
            label = f"{run}, rows of {result['length']:,}" if len(runs) > 1 else f"rows of {result['length']:,}"
            (line,) = axes.plot(middles, loss, marker=".", label=label)
            axes.fill_between(middles, loss - error, loss + error, alpha=0.2, color=line.get_color(), linewidth=0)
            ends |= {2**power for power in range(result["length"].bit_length())}
    _lengths(axes, sorted(ends)[::2], "position in the row (tokens of the document before); shaded: standard error")
    axes.legend()
    return figure


def by_context(runs: Results) -> Figure:
    """Loss of the same tokens over the length of the row, less that of the shortest rows; a line a run."""
    figure, axes = _lines(runs, "change of the loss of the same tokens (nats per token)")
    lengths: set[int] = set()
    for run, results in runs.items():
        own = _of(results, LOSSES[1])
        across, found = [each["length"] for each in own], changes(own)
        error = np.array([each["error"] for each in found], float)  # nan, where there is none
        label = f"{run}: {own[across.index(min(across))]['loss']:.4f} with {min(across):,}"
        axes.errorbar(across, [each["loss"] for each in found], error, marker=".", capsize=3, label=label)
        lengths |= set(across)
        scored = own[0]["scored"]
        axes.set_title(f"the last {scored:,} tokens of rows that all end in the same place", fontsize=10)
    _lengths(axes, sorted(lengths), "tokens in the row (bars: standard error over documents)")
    axes.legend()
    return figure


def by_kind(runs: Results) -> Figure:
    """Loss of each kind of document, in the longest rows; a bar a run."""
    longest = {run: max(_of(results, LOSSES[2]), key=lambda each: each["length"]) for run, results in runs.items()}
    kinds = list(dict.fromkeys(each["kind"] for result in longest.values() for each in result["kinds"]))
    figure = Figure(figsize=(max(4.0, 1.5 + 0.8 * len(kinds)), 4), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(runs)
    for number, (run, result) in enumerate(longest.items()):
        loss = {each["kind"]: each["loss"] for each in result["kinds"]}
        places = [place + number * width for place, kind in enumerate(kinds) if kind in loss]
        axes.bar(places, [loss[kind] for kind in kinds if kind in loss], width, label=run)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(kinds))], kinds, rotation=30, ha="right")
    length = max(result["length"] for result in longest.values())
    axes.set(ylabel="loss (nats per token)", title=f"rows of {length:,} tokens")
    axes.legend()
    return figure
