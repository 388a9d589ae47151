"""Compares two runs: configs, environments, and metrics step by step."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ringattn.palette import BLACK, BLUE, GREEN, VERMILION
from ringattn.runs.files import write_figure
from ringattn.runs.metrics import read_rows
from ringattn.units import first_line

METRICS = ("loss", "grad_norm", "learning_rate", "skipped")
"""Compared metrics, besides those of validations (eval/...)."""
MISSING = "missing"
"""Stands for a value that one of the runs does not have."""
PLOTTED = {"loss": (BLUE, "."), "grad_norm": (GREEN, "."), "eval/loss": (VERMILION, "o")}
"""Colour and marker of the metrics whose relative differences are plotted."""

Series = dict[str, dict[int, float | None]]
"""Values of each metric by step; None if a step has no finite value."""


@dataclass(frozen=True)
class MetricComparison:
    """Differences of one metric at the steps that both runs have. A step is None if there is no such step."""

    compared: int
    """Number of steps that both runs have."""
    first_different: int | None
    """First step whose values differ in any bit."""
    first_beyond: int | None
    """First step whose values differ by more than the tolerance."""
    largest: float
    """Largest relative difference: |a - b| / max(|a|, |b|); infinite if only one is a number."""
    largest_step: int | None
    missing: tuple[tuple[int, ...], tuple[int, ...]]
    """Steps that only the other run has, for each of the runs."""

    @property
    def equal(self) -> bool:
        return self.first_beyond is None and not any(self.missing)


@dataclass(frozen=True)
class Comparison:
    """The differences of two runs."""

    runs: tuple[str, str]
    tolerance: float
    config: dict[str, tuple[Any, Any]]
    """Values of config fields that differ, by name."""
    environment: dict[str, tuple[Any, Any]]
    metrics: dict[str, MetricComparison]

    @property
    def equal(self) -> bool:
        """True if both runs have the same steps, and all metrics are equal within the tolerance."""
        return all(each.equal for each in self.metrics.values())


def compare(first: Path, second: Path, tolerance: float) -> Comparison:
    """Compares the runs in two directories. Raises ValueError if one is not that of a run, or has no metrics."""
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ValueError(f"--tolerance {tolerance} must be a number of at least 0, such as 1e-5")
    pair = first, second
    configs, series = [_settings(path, "config.json") for path in pair], [read_series(path) for path in pair]
    environments = [_settings(path, "environment.json") for path in pair]
    names = dict.fromkeys([*series[0], *series[1]])
    return Comparison(
        runs=(str(first), str(second)),
        tolerance=tolerance,
        config=_differences(*configs),
        environment=_differences(*environments),
        metrics={name: _compare(series[0].get(name, {}), series[1].get(name, {}), tolerance) for name in names},
    )


def relative_difference(a: float | None, b: float | None) -> float:
    """Returns |a - b| / max(|a|, |b|); 0 if both are None, and infinity if only one is."""
    if a == b:
        return 0.0
    return math.inf if a is None or b is None else abs(a - b) / max(abs(a), abs(b))


def read_series(directory: Path) -> Series:
    """Returns the metrics of the run in `directory`. Raises ValueError if there are none, or if one is no number."""
    path = directory / "metrics.jsonl"
    rows = read_rows(path)
    if not rows:
        problem = "has no rows" if path.is_file() else "is missing"
        raise ValueError(f"{directory} is not the directory of a run with metrics: {path} {problem}; use another")
    series: Series = {}
    for row in rows:
        for name, value in row.items():
            if name in METRICS or name.startswith("eval/"):
                series.setdefault(name, {})[row["step"]] = None if value is None or math.isnan(value) else float(value)
    if not series:
        raise ValueError(f"{path} has no {', '.join(METRICS)} or eval/...; use the directory of another run")
    return series


def _settings(directory: Path, name: str) -> dict[str, Any]:
    """Returns the values in a JSON file of a run directory by dotted name. Raises ValueError if it cannot be read."""
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{directory} is not a run directory: {name} is missing; use the directory of a run")
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)}); restore it") from None
    return dict(_flat(content, ""))


def _flat(content: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat = []
    for name, value in content.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return flat


def _differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (first.get(name, MISSING), second.get(name, MISSING)) for name in {**first, **second}}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _compare(first: dict[int, float | None], second: dict[int, float | None], tolerance: float) -> MetricComparison:
    differences = {step: relative_difference(first[step], second[step]) for step in sorted(first.keys() & second)}
    largest = max(differences.values(), default=0.0)
    return MetricComparison(
        compared=len(differences),
        first_different=next((step for step, value in differences.items() if value > 0), None),
        first_beyond=next((step for step, value in differences.items() if value > tolerance), None),
        largest=largest,
        largest_step=next((step for step, value in differences.items() if value == largest > 0), None),
        missing=(tuple(sorted(second.keys() - first)), tuple(sorted(first.keys() - second))),
    )


def report(c: Comparison) -> list[str]:
    """Returns the lines that describe a comparison."""
    lines = [f"A: {c.runs[0]}", f"B: {c.runs[1]}"]
    for name, differences in {"config": c.config, "environment": c.environment}.items():
        lines.append(f"{name}: {'different (A, B)' if differences else 'equal'}")
        lines += [f"  {field}: {_short(a)}, {_short(b)}" for field, (a, b) in differences.items()]
    width = max(map(len, c.metrics))
    beyond = f"first beyond {c.tolerance:g}"
    columns = f"{'steps':>6}  {'first different':>15}  {beyond:>20}  largest relative difference"
    lines.append(f"{'metric':<{width}}  {columns}")
    for name, each in c.metrics.items():
        largest = "0" if each.largest_step is None else f"{each.largest:.3g} at step {each.largest_step}"
        steps = f"{_step(each.first_different):>15}  {_step(each.first_beyond):>20}"
        lines.append(f"{name:<{width}}  {each.compared:>6}  {steps}  {largest}")
    for run, letter in enumerate("AB"):
        for name, each in c.metrics.items():
            if steps := each.missing[run]:
                lines.append(f"missing in {letter}: {name} of {len(steps)} steps, {steps[0]} to {steps[-1]}")
    return [*lines, _verdict(c)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _step(step: int | None) -> str:
    return "-" if step is None else f"step {step}"


def _verdict(c: Comparison) -> str:
    if not c.equal:
        beyond = [(each.first_beyond, name) for name, each in c.metrics.items() if each.first_beyond is not None]
        step, name = min(beyond, key=lambda pair: pair[0], default=(0, ""))
        return f"different: {name} at step {step}" if beyond else "different: steps are missing"
    exact = all(each.first_different is None for each in c.metrics.values())
    return "equal bit for bit" if exact else f"equal within a relative tolerance of {c.tolerance:g}"


def plot(c: Comparison, path: Path) -> None:
    """Plots the losses of both runs, and the relative differences by step, as a PNG."""
    first, second = (read_series(Path(run)) for run in c.runs)
    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True)
    for series, run, color, style in ((first, c.runs[0], BLUE, "-"), (second, c.runs[1], VERMILION, "--")):
        losses.plot(*_points(series.get("loss", {})), style, color=color, label=f"training, {run}")
        losses.plot(*_points(series.get("eval/loss", {})), "o", color=color, label=f"validation, {run}")
    for name, (color, marker) in PLOTTED.items():
        a, b = first.get(name, {}), second.get(name, {})
        each = {step: relative_difference(a[step], b[step]) for step in sorted(a.keys() & b)}
        differences.plot(*_points(each), marker, color=color, label=name)
    differences.axhline(c.tolerance, color=BLACK, linestyle=":", label="tolerance")
    least = min((each.largest for each in c.metrics.values() if each.largest > 0), default=1.0)
    differences.set_yscale("symlog", linthresh=min(1e-8, max(least, 1e-12)))
    differences.set_ylim(bottom=0)
    _label(losses, "loss (nats per token)")
    _label(differences, "relative difference")
    differences.set_xlabel("step")
    write_figure(path, figure)


def _points(values: dict[int, Any]) -> tuple[list[int], np.ndarray]:
    """Returns steps and values, with NaN for None and infinity, which leaves a gap."""
    numbers = np.array([np.nan if value is None else value for value in values.values()], np.float64)
    return list(values), np.where(np.isfinite(numbers), numbers, np.nan)


def _label(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()
