"""How an evaluation is told: results.json, a Markdown table, plots; of one run or of several, in the same way."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringattn import config
from ringattn.config import LOSSES
from ringattn.environment import environment
from ringattn.evaluation import plots
from ringattn.evaluation.losses import changes

Result = dict[str, Any]
BESIDE = ("bits per byte", "right", "tokens", "rows", "of documents")
"""What stands beside every loss."""


def report(runs: dict[str, list[Result]], c: config.Evaluation, folder: Path, facts: dict[str, Any]) -> None:
    """Writes results.json, table.md and plots/ of each run's results to `folder`, in the place of earlier ones.

    `facts` are written, too; a `note` among them stands above the table. Raises ValueError if it cannot write.
    """
    rows = [{"run": run} | result for run, results in runs.items() for result in results]
    content = facts | {"config": asdict(c), "environment": environment(), "results": rows}
    parts = [*([facts["note"]] if facts.get("note") else []), *tables(runs)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(c, folder / "config.json")
        (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        plots.draw(runs, folder / "plots")
    except OSError as error:
        cure = "mend that, and give the command again: what was finished is kept"
        raise ValueError(f"cannot write to {folder} ({error.strerror}): {cure}") from error


def in_words(result: Result) -> str:
    """A line for the screen."""
    depth = "" if result["depth"] is None else f", depth {result['depth']:.0%}"
    text = f"{result['task']}, {result['length']:,} tokens{depth}: "
    if "rate" in result:
        return text + f"{result['right']} of {result['samples']} right, {result['nats']:.3f} nats an answer"
    if "kinds" in result:
        kinds = [f"{each['kind']} {each['loss']:.4f}" for each in result["kinds"]]
        return text + ", ".join([*kinds, *(f"{kind} less than a row" for kind in result["too_short"])])
    return text + f"loss {result['loss']:.4f} nats per token"


def tables(runs: dict[str, list[Result]]) -> Iterable[str]:
    """Markdown: a grid of length and depth for each task that has depths; then other retrieval; then losses."""
    several = len(runs) > 1
    for task in dict.fromkeys(each["task"] for results in runs.values() for each in results):
        for run, results in runs.items():
            own = [each for each in results if each["task"] == task]
            title = f"## {task}" + f" of {run}" * several
            if own[0]["depth"] is not None:
                yield f"{title}: exact match by length and depth (95 % interval)\n\n{_grid(own)}"
            elif "rate" in own[0]:
                yield f"{title}\n\n{_rates(own)}"
            else:
                yield f"{title}{_missing(own)}\n\n{_changes(own) if task == LOSSES[1] else _losses(own)}"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rate(result: Result) -> str:
    return f"{result['rate']:.3f} ({result['low']:.2f} to {result['high']:.2f})"


def _grid(results: list[Result]) -> str:
    depths = list(dict.fromkeys(each["depth"] for each in results))
    lengths = list(dict.fromkeys(each["length"] for each in results))
    cells = {(each["length"], each["depth"]): _rate(each) for each in results}
    header = ["tokens", *(f"depth {depth:.0%}" for depth in depths)]
    return _table(header, ([f"{length:,}", *(cells[length, depth] for depth in depths)] for length in lengths))


def _rates(results: list[Result]) -> str:
    header = ["tokens", "exact match (95 % interval)", "answers right", "nats an answer"]
    return _table(
        header,
        ([f"{x['length']:,}", _rate(x), f"{x['answers']:.3f}", f"{x['nats']:.3f}"] for x in results),
    )


def _missing(results: list[Result]) -> str:
    """Kinds of document that had no row of some length."""
    missing = list(dict.fromkeys(kind for each in results for kind in each.get("too_short", ())))
    return f": less than a row of {', '.join(missing)}" if missing else ""


def _losses(results: list[Result]) -> str:
    rows = []
    for result in results:
        for each in result.get("kinds", [result]):
            rows.append([f"{result['length']:,}", each.get("kind", "all"), f"{each['loss']:.4f}", *_beside(each)])
    return _table(["tokens in a row", "kind", "nats per token", *BESIDE], rows)


def _changes(results: list[Result]) -> str:
    shortest = min(each["length"] for each in results)
    header = ["tokens in a row", "nats per token", f"less than with {shortest:,} (± standard error)", *BESIDE]
    rows = []
    for result, change in zip(results, changes(results), strict=True):
        less, error = f"{-change['loss']:.4f}", change["error"]
        less = "-" if result["length"] == shortest else less if error is None else f"{less} ± {error:.4f}"
        rows.append([f"{result['length']:,}", f"{result['loss']:.4f}", less, *_beside(result)])
    return _table(header, rows)


def _beside(result: Result) -> list[str]:
    bits = "-" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f}"
    counts = (f"{result[name]:,}" if name in result else "-" for name in ("tokens", "rows", "documents"))
    return [bits, f"{result['accuracy']:.1%}", *counts]
