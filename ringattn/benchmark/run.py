"""A benchmark from its config to its folder: length by length and ring by ring."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from rich.console import Console

from ringattn import config
from ringattn.benchmark.report import Row, make_console, plot, skipped, table, write_json
from ringattn.benchmark.subjects import PASSES, Case, make_attend, make_pass, placed_inputs, useful_flops
from ringattn.benchmark.timing import Program, calls_a_sample, compiled, rounds
from ringattn.environment import environment
from ringattn.mesh import ring, start

Key = tuple[str, str]
"""Pass and subject."""


def benchmark(c: config.Benchmark) -> int:
    """Measures all subjects at every length and ring size, tells, and leaves all in the run's folder.

    results.json and the plot are rewritten after each length and ring size; those of an earlier run are replaced.
    Returns the process's exit status, 0. Raises ValueError, with a cure, where config, devices and folder do not fit
    each other; what a single subject cannot do is told and left out.
    """
    start(config.Mesh(simulate=c.simulate))
    rings = ring_sizes(c)
    folder, console = prepare_folder(c), make_console()
    console.print(f"{jax.device_count()} {jax.devices()[0].device_kind} devices, results go to {folder}")
    rows: list[Row] = []
    for size, tokens in product(rings, c.shard_tokens):
        case = Case(size * tokens, size, c.heads, c.kv_heads, c.head_dim, c.dtype)
        title = f"{case.length:,} tokens over a ring of {size}"
        console.print(f"{title}: compiling")
        found = measure(c, case, console)
        rows += found
        console.print(table(found, f"{title}, {about(c)}", c.baselines), *skipped(found), "", sep="\n")
        write_json({"config": asdict(c), "environment": surroundings(), "rows": rows}, folder / "results.json")
        plot(rows, f"Causal attention, {about(c)}, on {jax.devices()[0].device_kind}", folder / "plots/benchmark.png")
    console.print(f"results.json and plots/benchmark.png are in {folder}")
    return 0


def about(c: config.Benchmark) -> str:
    heads = f"{c.heads} heads" + (f" ({c.kv_heads} of K/V)" if c.kv_heads != c.heads else "")
    return f"{heads} of {c.head_dim}, {c.dtype}"


def ring_sizes(c: config.Benchmark) -> list[int]:
    """With -1 resolved. Raises ValueError if the devices are too few, or other processes' as well."""
    if jax.process_count() > 1:
        cure = "start it on one host alone"
        raise ValueError(
            f"a benchmark runs in one process, not in {jax.process_count()} that wait for each other: {cure}"
        )
    there = jax.device_count()
    sizes = list(dict.fromkeys(there if size == -1 else size for size in c.rings))
    if max(sizes) > there:
        fitting = " ".join(str(size) for size in sizes if size <= there) or "-1"
        cure = f"use --rings {fitting}, or --simulate {max(sizes)} for simulated CPU devices"
        raise ValueError(f"rings={c.rings} do not fit {there} device{'s' * (there > 1)}: {cure}")
    return sizes


def prepare_folder(c: config.Benchmark) -> Path:
    """The run's folder, with its config. Raises ValueError if it cannot be written, or is another kind of run's."""
    folder = Path(c.directory) / c.name
    path = folder / "config.json"
    if path.is_file():
        try:
            config.load(path, config.Benchmark)
        except ValueError as error:
            raise ValueError(f"{error}; to keep what lies in {folder} choose another --name") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(c, path)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --directory") from None
    return folder


def surroundings() -> dict[str, Any]:
    """The environment, with the version of the package that is compared with, where it is installed."""
    found = environment()
    try:
        return found | {"packages": found["packages"] | {"ringattention": version("ringattention")}}
    except PackageNotFoundError:
        return found


def measure(c: config.Benchmark, case: Case, console: Console) -> list[Row]:
    """A row for each pass and subject, of which some may say that they were skipped, and why."""
    programs: dict[Key, tuple[Program, int]] = {}
    reasons: dict[Key, str] = {}
    for key, outcome in prepare_all(c, case):
        if isinstance(outcome, str):
            reasons[key] = outcome
        else:
            programs[key] = outcome
    samples: dict[Key, list[float]] = {key: [] for key in programs}
    console.print(f"measuring for {c.seconds} s, or longer if three rounds need it")
    for each in rounds(programs, c.seconds) if programs else ():
        for key, seconds in each.items():
            samples[key].append(seconds)
    rows = []
    for pass_, text in product(PASSES, c.subjects):
        row: Row = {"length": case.length, "ring": case.shards, "shard_tokens": case.length // case.shards}
        row |= {"subject": text, "pass": pass_, "skipped": reasons.get((pass_, text))}
        if row["skipped"] is None:
            own = samples[pass_, text]
            others = {name: samples[pass_, name] for name in c.baselines if (pass_, name) in samples}
            row |= {"seconds": median(own), "samples": own, "temp_bytes": programs[pass_, text][0].temp_bytes}
            row["flops_per_second"] = useful_flops(config.parse_subject(text), case, pass_) / median(own)
            row["speed"] = {name: speed(own, other) for name, other in others.items()}
        rows.append(row)
    jax.clear_caches()
    return rows


def prepare_all(c: config.Benchmark, case: Case) -> Iterator[tuple[Key, tuple[Program, int] | str]]:
    """Each pass and subject compiled, and its calls in a sample, or why it cannot be; equal inputs are shared."""
    mesh, shared = ring(case.shards), {}
    for text, pass_ in product(c.subjects, PASSES):
        subject = config.parse_subject(text)
        wanted = (subject.method in ("dense", "ringattention") and subject.method, subject.layout, subject.documents)
        try:
            attend = make_attend(subject, mesh)
            if wanted not in shared:
                shared[wanted] = placed_inputs(subject, case, mesh)
            with nullcontext() if subject.method == "dense" else jax.set_mesh(mesh):
                program = compiled(make_pass(pass_, attend), shared[wanted])
            yield (pass_, text), (program, calls_a_sample(program))
        except (ValueError, NotImplementedError, ModuleNotFoundError, MemoryError, JaxRuntimeError) as error:
            yield (pass_, text), (str(error).strip().splitlines() or [type(error).__name__])[0]


def speed(samples: list[float], baseline: list[float]) -> dict[str, float]:
    """How many times as fast as the baseline: within each round, the median of these and their quartiles."""
    low, middle, high = np.quantile(np.array(baseline) / np.array(samples), (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}
