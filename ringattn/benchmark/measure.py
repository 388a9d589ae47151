"""Runs a benchmark: measures all subjects at every length and ring size, and writes the run directory."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from rich.console import Console

from ringattn import config
from ringattn.benchmark.cycles import count_cycles
from ringattn.benchmark.report import Result, Speed, make_console, plot, skipped, table
from ringattn.benchmark.subjects import PASSES, Case, Inputs, make_attend, make_pass, place_inputs, useful_flops
from ringattn.benchmark.timing import Program, calls_per_sample, compile_program, rounds
from ringattn.environment import environment
from ringattn.mesh.devices import ring_mesh, start
from ringattn.runs.files import write_json, write_text
from ringattn.runs.shared import claimed
from ringattn.units import first_line

Key: TypeAlias = tuple[str, str]
"""Pass and subject."""


def benchmark(c: config.Benchmark) -> int:
    """Measures all subjects at every length and ring size, prints tables, and writes results and plot.

    With `c.topology`, counts cycles instead: see `cycles.count_cycles`.

    Rewrites results.json and the plot after each length and ring size, and replaces those of an earlier run. Returns
    the exit status of the process, 0. Raises ValueError, with a fix, if the config does not fit the devices or the run
    directory, or if another process writes there. A subject that cannot run is reported and skipped.
    """
    mesh = config.Mesh(simulate=c.simulate)
    if c.topology is not None:
        with claimed([Path(c.directory) / c.name], config.Mesh(), "use another --name", "use another --directory"):
            count_cycles(c, prepare_directory(c))
        return 0
    with claimed([Path(c.directory) / c.name], mesh, "use another --name", "use another --directory"):
        start(mesh)
        return _benchmark_claimed(c, ring_sizes(c))


def _benchmark_claimed(c: config.Benchmark, rings: list[int]) -> int:
    """Measures in a run directory that no other process writes. Returns the exit status of the process."""
    directory, console = prepare_directory(c), make_console()
    kind = jax.devices()[0].device_kind
    console.print(f"{jax.device_count()} {kind} devices, writing results to {directory}")
    results: list[Result] = []
    for size, tokens in product(rings, c.shard_tokens):
        case = Case(size * tokens, size, c.heads, c.kv_heads, c.head_dim, c.dtype)
        title = f"{case.length:,} tokens on a ring of {size}"
        console.print(f"{title}: compiling")
        new = measure(c, case, console)
        results += new
        console.print(table(new, f"{title}, {describe_heads(c)}", c.baselines), *skipped(new), "", sep="\n")
        content = {"config": asdict(c), "environment": benchmark_environment(), "rows": results}
        write_json(directory / "results.json", content)
        plot(results, f"Causal attention, {describe_heads(c)}, on {kind}", directory / "plots/benchmark.png")
    console.print(f"results.json and plots/benchmark.png are in {directory}")
    return 0


def describe_heads(c: config.Benchmark) -> str:
    heads = f"{c.heads} heads" + (f" ({c.kv_heads} K/V heads)" if c.kv_heads != c.heads else "")
    return f"{heads} of {c.head_dim}, {c.dtype}"


def ring_sizes(c: config.Benchmark) -> list[int]:
    """Ring sizes with -1 resolved. Raises ValueError if they exceed the devices or there is more than one process."""
    if jax.process_count() > 1:
        raise ValueError(f"a benchmark runs in one process, not in {jax.process_count()}; start it on one host only")
    devices = jax.device_count()
    sizes = list(dict.fromkeys(devices if size == -1 else size for size in c.rings))
    if max(sizes) > devices:
        fitting = " ".join(str(size) for size in sizes if size <= devices) or "-1"
        fix = f"use --rings {fitting}, or --simulate {max(sizes)} for simulated CPU devices"
        raise ValueError(f"rings={c.rings} do not fit {devices} device{'s' * (devices > 1)}; {fix}")
    return sizes


def prepare_directory(c: config.Benchmark) -> Path:
    """Creates the run directory with config.json. Raises ValueError if it is not writable or of another kind."""
    directory = Path(c.directory) / c.name
    path = directory / "config.json"
    if path.is_file():
        try:
            config.load(path, config.Benchmark)
        except ValueError as error:
            raise ValueError(f"{error}; to keep the files in {directory} use another --name") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, config.to_json(c))
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror}); use another --directory") from None
    return directory


def benchmark_environment() -> dict[str, Any]:
    """The environment, with the version of ringattention if it is installed."""
    described = environment()
    try:
        return described | {"packages": described["packages"] | {"ringattention": version("ringattention")}}
    except PackageNotFoundError:
        return described


def measure(c: config.Benchmark, case: Case, console: Console) -> list[Result]:
    """Measures every pass of every subject. Skipped ones have a reason instead of numbers."""
    programs: dict[Key, tuple[Program, int]] = {}
    reasons: dict[Key, str] = {}
    for key, outcome in compile_all(c, case):
        if isinstance(outcome, str):
            reasons[key] = outcome
        else:
            programs[key] = outcome
    samples: dict[Key, list[float]] = {key: [] for key in programs}
    console.print(f"measuring for {c.seconds} s, or longer if three rounds take longer")
    for times in rounds(programs, c.seconds) if programs else ():
        for key, seconds in times.items():
            samples[key].append(seconds)
    results = []
    for pass_, text in product(PASSES, c.subjects):
        result: Result = {
            "length": case.length,
            "ring": case.shards,
            "shard_tokens": case.length // case.shards,
            "subject": text,
            "pass": pass_,
            "skipped": reasons.get((pass_, text)),
        }
        if result["skipped"] is None:
            result["samples"] = samples[pass_, text]
            result["seconds"] = median(result["samples"])
            result["temp_bytes"] = programs[pass_, text][0].temp_bytes
            result["flops_per_second"] = useful_flops(config.parse_subject(text), case, pass_) / result["seconds"]
            result["speed"] = {
                name: relative_speed(result["samples"], samples[pass_, name])
                for name in c.baselines
                if (pass_, name) in samples
            }
        results.append(result)
    jax.clear_caches()
    return results


def compile_all(c: config.Benchmark, case: Case) -> Iterator[tuple[Key, tuple[Program, int] | str]]:
    """Yields each pass and subject with its program and calls per sample, or with the reason why it cannot run.

    Subjects that need the same inputs share them.
    """
    mesh, shared = ring_mesh(case.shards), dict[tuple[str, str, int], Inputs]()
    for text, pass_ in product(c.subjects, PASSES):
        subject = config.parse_subject(text)
        placement = subject.method if subject.method in ("dense", "ringattention") else "ring"
        inputs_key = (placement, subject.layout, subject.documents)
        try:
            attend = make_attend(subject, mesh)
            if inputs_key not in shared:
                shared[inputs_key] = place_inputs(subject, case, mesh)
            with nullcontext() if subject.method == "dense" else jax.set_mesh(mesh):
                program = compile_program(make_pass(pass_, attend), shared[inputs_key])
            yield (pass_, text), (program, calls_per_sample(program))
        except (ValueError, NotImplementedError, ModuleNotFoundError, MemoryError, JaxRuntimeError) as error:
            yield (pass_, text), first_line(error)


def relative_speed(samples: list[float], baseline: list[float]) -> Speed:
    """Speed as a multiple of the baseline's, computed within each round: median and quartiles over the rounds."""
    low, middle, high = np.quantile(np.array(baseline) / np.array(samples), (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}
