"""The command `scripts/plan.py`: checks where it writes, plans a step, and writes the report."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ringattn import config
from ringattn.planning.cache import Cache, user_directory
from ringattn.planning.candidates import Open
from ringattn.planning.choice import plan_open
from ringattn.planning.compile import Plan, Target, prepare
from ringattn.planning.decoding import DecodePlan, plan_decode
from ringattn.planning.reach import max_context
from ringattn.planning.report import write_report
from ringattn.planning.sweep import sweep
from ringattn.planning.trials import try_changes
from ringattn.runs.files import cannot_write, check_writable, write_json, writing
from ringattn.runs.progress import Display


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    topology: str | None = None
    """Target devices, which need not be present: a TPU topology, such as v5e:8x8 or v5p:4x4x4; GPUs, such as h100:8 or
    h100:2x8 (hosts x GPUs); or cpu:N for N CPU devices. Required."""
    json: str | None = None
    """Also write the plan to this JSON file."""
    stage: int | None = None
    """Stage to plan, from 1. Required for a config with several stages."""
    decode: bool | None = None
    """Plan a step of decoding with a cache of data.seq_len tokens, instead of a train step. Default: False."""
    max_context: bool | None = None
    """Also search for the longest rows that fit, by compiling the step for several lengths. Default: False."""
    sweep: Literal["chips"] | None = None
    """Also search for the longest rows on a half, a quarter and an eighth of the devices."""
    changes: bool | None = None
    """If the step does not fit, also compile each change that reduces its memory. Default: False."""
    cache: bool | None = None
    """Read steps that were compiled before from the user's cache directory. Not for cpu:N. Default: True."""
    ranking: bool | None = None
    """Also rank strategies, layouts, meshes and rematerializations, and compile the best four. Default: False."""


def run(c: config.Config, options: Options) -> Plan | DecodePlan:
    """Plans a step; writes the report of a train step to the directory `plan` of the run directory, and the JSON file.

    Raises ValueError, before it compiles, if `c` or the topology is not valid or if a file cannot be written.
    """
    topology = options.topology
    if topology is None:
        raise ValueError("--topology is required, such as --topology v5e:8x8")
    if options.json is not None:
        check_writable(Path(options.json), "--json")
    display = Display(None, every_process=True)
    if options.decode:
        _check_decode(options)
        plan = plan_decode(c, topology, display.waiting("compiling the step"))
        _write_json(options.json, asdict(plan))
        return plan
    target = None if any(Open.of(c)) else prepare(c, topology)
    directory = c.run_directory / "plan"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        check_writable(directory / "report.md", "--log.directory")
    except OSError as error:
        raise cannot_write(directory, error.strerror or str(error)) from None
    cache = Cache(None if options.cache is False else user_directory())
    if target is None or options.ranking:
        c, plan = plan_open(c, topology, cache.plan, display.print, everything=bool(options.ranking))
        target = prepare(c, topology)
    else:
        with display.waiting("compiling the step"):
            plan = cache.plan(c, target)
    plan = _with_searches(plan, c, target, options, display, cache)
    with writing(directory):
        write_report(plan, directory)
    display.print(f"report: {directory / 'report.md'}")
    _write_json(options.json, plan.to_json())
    return plan


def _check_decode(options: Options) -> None:
    for name in ("max_context", "sweep", "changes", "ranking"):
        if value := vars(options)[name]:
            raise ValueError(f"--{name.replace('_', '-')} {value} plans train steps; leave out --decode True")


def _with_searches(
    plan: Plan, c: config.Config, target: Target, options: Options, display: Display, cache: Cache
) -> Plan:
    """Returns the plan with what the options search for."""
    if options.changes and plan.refusal is not None:
        with display.waiting("compiling changes that reduce the memory"):
            plan = replace(plan, changes=try_changes(c, target, plan.refusal, display.print, cache.need))
    if options.sweep is not None:
        with display.waiting("searching for the longest rows on fewer devices"):
            found = sweep(c, target, display.print, cache.need, plan.need)
        most = found[-1].found
        return replace(plan, sweep=found, max_context=most if most.tokens else None)
    if options.max_context:
        with display.waiting("searching for the longest rows that fit"):
            plan = replace(plan, max_context=max_context(c, target, display.print, cache.need, plan.need))
    return plan


def _write_json(path: str | None, content: object) -> None:
    if path is not None:
        try:
            write_json(Path(path), content)
        except OSError as error:
            raise ValueError(f"cannot write --json {path} ({error.strerror}); use another") from None
