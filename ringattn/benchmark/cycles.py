"""Counts cycles of kernels, ring passes and training steps with the TPU compiler, without a TPU.

`cost.cycles` explains the two sources of cycles; the guide explains the method and its error.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from jax.errors import JaxRuntimeError
from rich.console import Console

from ringattn import config
from ringattn.benchmark.cycle_programs import Step, compile_ring, heads_of, make_ring, topology_mesh
from ringattn.benchmark.cycle_report import ProgramRow, kernel_table, plot, program_table
from ringattn.benchmark.kernel_rows import KernelRow, describe, kernel_rows, kernel_specs
from ringattn.benchmark.report import make_console
from ringattn.benchmark.subjects import Case, useful_flops
from ringattn.cost.attention_kernels import KernelSpec, call_cycles, pallas_tilings, ring_kernels, step_trips
from ringattn.cost.cycles import CYCLE_FLOPS, KernelSchedule
from ringattn.cost.program import Cost, Program
from ringattn.cost.visited import Ring, ring_counts
from ringattn.environment import environment
from ringattn.hardware import chip_name
from ringattn.planning.devices import devices_of
from ringattn.planning.kernel_schedules import kernel_schedules
from ringattn.runs.files import write_json
from ringattn.units import duration_in_words, first_line

Schedules = dict[KernelSpec, KernelSchedule | str]
TOKENS = 1024
"""Tokens per device are a multiple of it, so that no tile is padded: twice the largest tile."""


def count_cycles(c: config.Benchmark, directory: Path) -> None:
    """Compiles everything for `c.topology`, prints tables, and writes results.json and plots/cycles.png.

    Raises ValueError, with a fix, if the topology does not exist, a length is not a multiple of TOKENS, or libtpu is
    not installed. A kernel or program that does not compile is reported and skipped.
    """
    assert c.topology is not None
    for tokens in c.shard_tokens:
        if tokens % TOKENS:
            raise ValueError(
                f"shard_tokens={tokens} must be a multiple of {TOKENS} with topology; use {TOKENS} or 8192"
            )
    _Count(c, c.topology, directory).run()


class _Count:
    def __init__(self, c: config.Benchmark, topology: str, directory: Path):
        self.c, self.topology, self.directory = c, topology, directory
        self.console: Console = make_console()
        self.began = time.monotonic()
        self.schedules: dict[str, Schedules] = {}
        self.kernels: list[KernelRow] = []
        self.programs: list[ProgramRow] = []
        self.skipped: list[str] = []

    def run(self) -> None:
        kind = device_kind(self.topology)
        for text in self.c.steps or ():
            path, topology = text.split()  # check all now, because their turn comes after half an hour
            device_kind(topology)
            config.read(Path(path), config.Config)
        self.say(f"compiling for {self.topology} ({kind}), writing results to {self.directory}")
        specs = kernel_specs(self.c)
        self.schedule(self.topology, specs)
        found = self.schedules[self.topology]
        self.kernels = kernel_rows(self.c, self.topology, kind, found)
        self.skipped += [f"{describe(spec)}: {why}" for spec, why in found.items() if isinstance(why, str)]
        self.console.print(kernel_table(self.kernels), "")
        self.write()
        for row in self.rings(kind):
            self.add(row)
        for text in self.c.steps or ():
            path, topology = text.split()
            for kernel in ("pallas", "xla"):
                for row in self.step(path, topology, kernel):
                    self.add(row)
        self.write()
        self.console.print(program_table(self.programs), *(f"skipped {line}" for line in self.skipped), "", sep="\n")
        self.say(f"results.json and plots/cycles.png are in {self.directory}")

    def say(self, text: str) -> None:
        self.console.print(f"[{duration_in_words(time.monotonic() - self.began)}] {text}")

    def add(self, row: ProgramRow) -> None:
        self.programs.append(row)
        self.write()

    def write(self) -> None:
        rows = {"kernels": self.kernels, "programs": self.programs, "skipped": self.skipped}
        content = {"config": asdict(self.c), "environment": environment(), **rows}
        write_json(self.directory / "results.json", content)
        plot(self.kernels, self.programs, self.directory / "plots/cycles.png")

    def schedule(self, topology: str, specs: Sequence[KernelSpec]) -> None:
        """Compiles the kernels that are not compiled yet."""
        known = self.schedules.setdefault(topology, {})
        missing = [spec for spec in specs if spec not in known]
        for number, (spec, found) in enumerate(kernel_schedules(topology, missing) if missing else ()):
            known[spec] = found
            self.say(f"kernel {number + 1} of {len(missing)} for {topology}: {describe(spec)}")

    def rings(self, kind: str) -> Iterator[ProgramRow]:
        """Yields the passes of the rings over all devices of the topology."""
        mesh = topology_mesh(self.topology)
        for text in self.c.subjects:
            subject = config.parse_subject(text)
            length = self.c.shard_tokens[0] * mesh.size
            case = Case(length, mesh.size, self.c.heads, self.c.kv_heads, self.c.head_dim, self.c.dtype)
            try:
                ring = make_ring(subject, case)
                self.say(f"compiling {text} on {mesh.size} devices")
                program = Program(compile_ring(subject, case, mesh))
                specs = ring_kernels(ring, heads_of(case), segments=ring.documents > 1)
                self.schedule(self.topology, specs)
                flops = useful_flops(subject, case, "forward+backward") / mesh.size
                kernels = self.kernel_cycles(self.topology, kind, specs, ring, program.cost)
                yield program_row(self.topology, f"pass of {text}", kind, flops, program.cost.cycles, kernels)
            except (ValueError, JaxRuntimeError) as error:
                self.skipped.append(f"{text}: {first_line(error)}")

    def step(self, path: str, topology: str, kernel: str) -> Iterator[ProgramRow]:
        """Yields the mean layer (of a fused kernel) and the whole training step."""
        name = f"{Path(path).stem}, kernel={kernel!r}"
        self.say(f"compiling the training step of {name} for {topology}")
        try:
            step, kind = Step(path, topology, kernel), device_kind(topology)
            text = step.compile()
            if kernel == "xla":
                cost = Program(text, step_trips(step.config, step.mesh, kind)).cost
                yield program_row(topology, f"step of {name}", kind, step.useful_flops(), cost.cycles, None)
                return
            program, specs, layers = Program(text), step.kernels(), step.config.model.layers
            self.schedule(topology, specs)
            layer = [each.body for each in program.loops() if _is_layer(each.body, program.cost, layers)]
            for what, flops, costs in (
                (f"layer of {name}", step.useful_flops(layers=1), layer),
                (f"step of {name}", step.useful_flops(), [program.cost]),
            ):
                kernels = [self.kernel_cycles(topology, kind, specs, step.ring, cost) for cost in costs]
                totals = sum(own for own, _ in kernels), sum(visible for _, visible in kernels)
                yield program_row(topology, what, kind, flops, sum(cost.cycles for cost in costs), totals)
        except (ValueError, JaxRuntimeError) as error:
            self.skipped.append(f"{name}: {first_line(error)}")

    def kernel_cycles(
        self, topology: str, kind: str, specs: Sequence[KernelSpec], ring: Ring, cost: Cost
    ) -> tuple[float, float]:
        """Returns the cycles of the kernels that a program calls, and those of their visited tiles without a mask."""
        found = {spec: self.schedules[topology][spec] for spec in specs}
        counts = ring_counts(ring, pallas_tilings(specs[0], kind))
        calls = call_cycles(kind, found, {call: counts[call] for call in cost.calls})
        total = sum(times * calls[call].total for call, times in cost.calls.items())
        return total, sum(times * calls[call].visible for call, times in cost.calls.items())


def _is_layer(body: Cost, program: Cost, layers: int) -> bool:
    """Returns True for the body of a loop over layers. XLA may move layers out of the loop, so trips do not tell."""
    return bool(body.calls) and all(layers * times == program.calls[call] for call, times in body.calls.items())


def program_row(
    topology: str,
    what: str,
    kind: str,
    flops: float | int,
    xla_cycles: float | int,
    kernels: tuple[float, float] | None,
) -> ProgramRow:
    """Returns the row of a program; `kernels` has the cycles of its kernels and of their visited tiles alone."""
    own, visible = kernels or (0.0, None)
    ideal, total = flops / CYCLE_FLOPS[kind], xla_cycles + own
    return ProgramRow(
        topology=topology,
        program=what,
        ideal=ideal,
        xla=xla_cycles,
        kernels=own,
        cycles=total,
        utilisation=ideal / total,
        visible=visible,
    )


def device_kind(topology: str) -> str:
    """Returns the `chip_name` of a topology. Raises ValueError unless its cycles are known."""
    kind = chip_name(devices_of(topology))
    if kind not in CYCLE_FLOPS:
        raise ValueError(f"--topology {topology}: cycles are known for TPUs; use one such as v5e:2x4")
    return kind
