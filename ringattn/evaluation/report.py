"""The report of an evaluation of one or several runs: results.json, Markdown tables, plots."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringattn import config
from ringattn.config import LOSSES
from ringattn.environment import environment
from ringattn.evaluation import plots
from ringattn.evaluation.losses import changes
from ringattn.evaluation.results import Result, score_name
from ringattn.runs.files import write_json, write_text

COLUMNS = ("bits per byte", "accuracy", "tokens", "rows", "documents")
"""Columns that follow the loss in every table of losses."""


def write_report(runs: dict[str, list[Result]], c: config.Evaluation, directory: Path, facts: dict[str, Any]) -> None:
    """Writes config.json, results.json, table.md and plots/ for the results of `runs`. Replaces existing files.

    Generated answers are in answers.jsonl, one object per sample.

    `facts` are added to results.json. If they contain a `note`, it also precedes the table. Raises ValueError if a file
    cannot be written.
    """
    results = [{"run": run} | result for run, run_results in runs.items() for result in run_results]
    answers = [_cell(result) | row for result in results for row in result.pop("generated", ())]
    content = facts | {"config": asdict(c), "environment": environment(), "results": results}
    paragraphs = [*([facts["note"]] if facts.get("note") else []), *tables(runs)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "config.json", config.to_json(c))
        write_json(directory / "results.json", content)
        write_text(directory / "table.md", "\n\n".join(paragraphs) + "\n")
        if answers:
            write_text(directory / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in answers))
        else:  # those of other results
            (directory / "answers.jsonl").unlink(missing_ok=True)
        plots.write_plots(runs, directory / "plots")
    except OSError as error:
        fix = "fix the cause and run the same command again; it keeps finished results"
        raise ValueError(f"cannot write to {directory} ({error.strerror}); {fix}") from error


def _cell(result: Result) -> Result:
    return {name: result[name] for name in ("run", "task", "length", "depth")}


def describe(result: Result) -> str:
    """One line for the display."""
    depth = "" if result["depth"] is None else f", depth {result['depth']:.0%}"
    cell = f"{result['task']}, {result['length']:,} tokens{depth}: "
    if "generated" in result:
        return cell + f"{result['right']} of {result['samples']} answers correct, score {result['rate']:.3f}"
    if "rate" in result:
        return cell + f"{result['right']} of {result['samples']} correct, {result['nats']:.3f} nats per answer"
    if "kinds" in result:
        losses = [f"{kind['kind']} {kind['loss']:.4f}" for kind in result["kinds"]]
        return cell + ", ".join([*losses, *(f"{kind} less than one row" for kind in result["too_short"])])
    return cell + f"loss {result['loss']:.4f} nats per token"


def tables(runs: dict[str, list[Result]]) -> Iterator[str]:
    """Yields a Markdown table per task and run; exact match of tasks with depths is a grid of length and depth."""
    for task in dict.fromkeys(result["task"] for results in runs.values() for result in results):
        for run, results in runs.items():
            of_task = [result for result in results if result["task"] == task]
            title = f"## {task}" + f" of {run}" * (len(runs) > 1)
            if of_task[0]["depth"] is not None:
                title = f"{title}: {score_name(of_task[0])} by length and depth (95 % interval)"
                yield f"{title}\n\n{_depth_table(of_task)}"
            elif "rate" in of_task[0]:
                yield f"{title}\n\n{_retrieval_table(of_task)}"
            else:
                table = _context_table(of_task) if task == LOSSES[1] else _loss_table(of_task)
                yield f"{title}{_too_short(of_task)}\n\n{table}"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _exact_match(result: Result) -> str:
    return f"{result['rate']:.3f} ({result['low']:.2f} to {result['high']:.2f})"


def _depth_table(results: list[Result]) -> str:
    depths = list(dict.fromkeys(result["depth"] for result in results))
    lengths = list(dict.fromkeys(result["length"] for result in results))
    cells = {(result["length"], result["depth"]): _exact_match(result) for result in results}
    header = ["tokens", *(f"depth {depth:.0%}" for depth in depths)]
    return _table(header, ([f"{length:,}", *(cells[length, depth] for depth in depths)] for length in lengths))


def _retrieval_table(results: list[Result]) -> str:
    if "generated" in results[0]:
        header = ["tokens", f"{score_name(results[0])} (95 % interval)", "correct answers"]
        return _table(
            header, ([f"{x['length']:,}", _exact_match(x), f"{x['right']} of {x['samples']}"] for x in results)
        )
    header = ["tokens", "exact match (95 % interval)", "accuracy of single answers", "nats per answer"]
    rows = ([f"{x['length']:,}", _exact_match(x), f"{x['answers']:.3f}", f"{x['nats']:.3f}"] for x in results)
    return _table(header, rows)


def _too_short(results: list[Result]) -> str:
    """Names the kinds of document that do not fill one row of some length."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.get("too_short", ())))
    return f": {', '.join(kinds)} less than one row" if kinds else ""


def _loss_table(results: list[Result]) -> str:
    rows = []
    for result in results:
        for part in result.get("kinds", [result]):
            rows.append([f"{result['length']:,}", part.get("kind", "all"), f"{part['loss']:.4f}", *_columns(part)])
    return _table(["tokens per row", "kind", "nats per token", *COLUMNS], rows)


def _context_table(results: list[Result]) -> str:
    shortest = min(result["length"] for result in results)
    header = ["tokens per row", "nats per token", f"reduction from {shortest:,} (± standard error)", *COLUMNS]
    rows = []
    for result, change in zip(results, changes(results), strict=True):
        reduction, error = f"{-change['loss']:.4f}", change["error"]
        if result["length"] == shortest:
            reduction = "-"
        elif error is not None:
            reduction = f"{reduction} ± {error:.4f}"
        rows.append([f"{result['length']:,}", f"{result['loss']:.4f}", reduction, *_columns(result)])
    return _table(header, rows)


def _columns(result: Result) -> list[str]:
    bits = "-" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f}"
    counts = (f"{result[name]:,}" if name in result else "-" for name in ("tokens", "rows", "documents"))
    return [bits, f"{result['accuracy']:.1%}", *counts]
