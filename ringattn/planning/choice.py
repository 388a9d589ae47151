"""Chooses the values that a config leaves to the planner, for a run on this machine or for a plan."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.cost.memory import device_memory
from ringattn.mesh.axes import AXES
from ringattn.mesh.devices import check_kernel, resolve
from ringattn.mesh.processes import gather
from ringattn.mesh.topology import arrange_devices
from ringattn.planning.candidates import Candidate, Open
from ringattn.planning.compile import (
    Plan,
    Target,
    check_stages,
    compile_plan,
    needed,
    prepare,
    required_vocabulary,
)
from ringattn.planning.devices import devices_of
from ringattn.planning.memory import device_limit, host_limit
from ringattn.planning.rank import Limits, Outcome, Ranking, rank
from ringattn.training.launch import Chosen
from ringattn.units import first_line

TO_COMPILE = 4
"""Number of candidates that a ranking compiles. They differ in more than the rematerialization."""
REFUSALS = (ValueError, NotImplementedError, jax.errors.JaxRuntimeError)
"""Errors that exclude a candidate, such as a combination that the kernels do not support."""
Say = Callable[[str], None]
MakePlan = Callable[[config.Config, Target], Plan]


def choose(c: config.Config, vocabulary: int, say: Say = lambda line: None) -> Chosen:
    """Returns `c` with the values that it leaves open chosen for `jax.devices()`, and the reasons: `training.Choose`.

    `vocabulary` is the tokenizer's vocabulary size. `say` is called with a line before each compilation.

    Raises ValueError if no candidate divides over the devices, or if none fits.
    """
    dimensions, devices = Open.of(c), jax.devices()
    if not any(dimensions):
        return Chosen(c, ())
    sized = c if c.model.vocabulary is not None else with_values(c, {"model.vocabulary": vocabulary})
    limit = _limit(devices)

    def attempt(c: config.Config) -> Outcome:
        say(f"compiling {_describe(c)}")
        return _outcome(c, devices, limit)

    ranking = rank(sized, devices, Limits(limit, host_limit(devices[0])), attempt, dimensions=dimensions)
    first, *others = ranking.reasons
    return Chosen(chosen_config(c, ranking, dimensions), (f"{dimensions}: {first}", *others))


def chosen_config(c: config.Config, ranking: Ranking, dimensions: Open) -> config.Config:
    """Returns `c` with the chosen values. Raises ValueError if there are none."""
    if ranking.chosen is None:
        tried = [each for each in ranking.candidates if each.layout == c.attention.layout]
        least = min(tried, key=lambda each: (each.peak is None, each.peak or 0))
        fix = "use more devices, or reduce --data.seq_len or --train.batch_size"
        raise ValueError(f"{dimensions}: none of {len(tried)} candidates fits; {least.reason}; {fix}")
    return ranking.chosen.apply(c)


def plan(c: config.Config, topology: str, compiling: AbstractContextManager[Any] | None = None) -> Plan:
    """Compiles one update of `c` for a topology such as 'v5e:8x8', 'h100:2x8' or 'cpu:8'; allocates nothing on it.

    Values that `c` leaves open are chosen first. After all checks, it compiles inside the context `compiling`, such as
    a display.

    Raises ValueError if the topology does not exist, if its compiler (the extras `tpu` and `gpu-compiler`) is not
    installed, if `c` does not fit its mesh, if the step needs more than `COMPILED` times the memory of a device, or if
    `c` has several stages; `c.stage(2)` is the config of one stage.
    """
    targeted = None if any(Open.of(c)) else prepare(c, topology)
    with compiling or nullcontext():
        if targeted is not None:
            return compile_plan(c, targeted)
        return plan_open(c, topology, compile_plan, lambda line: None)[1]


def plan_open(
    c: config.Config, topology: str, make: MakePlan, say: Say, *, everything: bool = False
) -> tuple[config.Config, Plan]:
    """Returns `c` with the values that it leaves open chosen, and its plan, with the ranking.

    `make` is `compile_plan`, or reads its result from a cache. Raises ValueError.
    """
    check_stages(c)
    required_vocabulary(c.model)
    devices, plans, dimensions = devices_of(topology), {}, Open.of(c)
    check_kernel(c, devices[0].platform)
    ranking = None
    if any(dimensions):
        ranking = rank_step(c, topology, devices, plans, make, say, everything=False)
        c = chosen_config(c, ranking, dimensions)
    c = replace(c, mesh=replace(c.mesh, **resolve(c.mesh, len(devices))))  # equal to the candidate with these sizes
    if c not in plans:  # given, or the only candidate
        say(f"compiling {_describe(c)}")
        plans[c] = make(c, prepare(c, topology))
    if everything:
        ranking = rank_step(c, topology, devices, plans, make, say, everything=True)
    assert ranking is not None
    return c, replace(plans[c], ranking=ranking.candidates, reasons=ranking.reasons)


def rank_step(
    c: config.Config,
    topology: str,
    devices: Sequence[Any],
    plans: dict[config.Config, Plan],
    make: MakePlan,
    say: Say,
    *,
    everything: bool,
) -> Ranking:
    """Ranks the candidates of `c` for a topology with these devices. Adds to `plans` those that it compiles.

    With `everything`, ranks all strategies, layouts, meshes and rematerializations, and compiles up to `TO_COMPILE`.
    Otherwise ranks what `c` leaves open, and compiles until one fits, as a run does.
    """
    limit = device_limit(devices)

    def attempt(c: config.Config) -> Outcome:
        if c not in plans:
            say(f"compiling {_describe(c)}")
            try:
                plans[c] = make(c, Target(topology, _mesh(c, devices), limit))
            except REFUSALS as error:
                return Outcome(first_line(error), None)
        plan = plans[c]
        return Outcome(plan.refusal, plan.device_bytes.peak, None if plan.time is None else plan.time.seconds)

    dimensions, limits = (Open(True, True, True) if everything else Open.of(c)), Limits(limit, host_limit(devices[0]))
    count = TO_COMPILE if everything else 1
    return rank(c, devices, limits, attempt, dimensions=dimensions, compiled=count, layouts=everything)


def _outcome(c: config.Config, devices: Sequence[Any], limit: int | None) -> Outcome:
    """Compiles the step of `c` for the devices of this machine."""
    try:
        need = needed(c, Target("this machine", _mesh(c, devices), limit))
    except REFUSALS as error:
        return Outcome(first_line(error), None)
    return Outcome(need.refusal, need.peak)


def _mesh(c: config.Config, devices: Sequence[Any]) -> jax.sharding.Mesh:
    return arrange_devices(resolve(c.mesh, len(devices)), devices)


def _limit(devices: Sequence[Any]) -> int | None:
    """Returns the bytes that a program may use on each device of the run: the smallest of all processes."""
    known = [size for size in (device_limit(devices), device_memory(jax.local_devices()[0])) if size is not None]
    return min((int(size) for size in gather(str(min(known)))), default=None) if known else None


def _describe(c: config.Config) -> str:
    sizes = {name: vars(c.mesh)[name] for name in AXES}
    return str(Candidate(tuple(sizes.values()), c.attention.strategy, c.attention.layout, c.model.remat))
