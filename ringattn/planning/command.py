"""The command `scripts/plan.py`: checks where it writes, plans a step, and writes the report."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from ringattn import config
from ringattn.planning.compile import Plan, compile_plan, prepare
from ringattn.planning.decoding import DecodePlan, plan_decode
from ringattn.planning.reach import max_context
from ringattn.planning.report import write_report
from ringattn.runs.files import cannot_write, check_writable, write_json, writing
from ringattn.runs.progress import Display


class Request(NamedTuple):
    """Options of a plan.

    Attributes:
      json: also write the plan to this file.
      decode: plan a step of decoding instead of a train step.
      max_context: also search for the longest rows that fit.
    """

    topology: str
    json: str | None = None
    decode: bool = False
    max_context: bool = False


def run(c: config.Config, request: Request) -> Plan | DecodePlan:
    """Plans a step; writes the report of a train step to the directory `plan` of the run directory, and the JSON file.

    Raises ValueError, before it compiles, if `c` or the topology is not valid or if a file cannot be written.
    """
    if request.json is not None:
        check_writable(Path(request.json), "--json")
    display = Display(None, every_process=True)
    if request.decode:
        if request.max_context:
            raise ValueError("--max-context True plans train steps; leave out --decode True")
        plan = plan_decode(c, request.topology, display.waiting("compiling the step"))
        _write_json(request.json, asdict(plan))
        return plan
    target = prepare(c, request.topology)
    directory = c.run_directory / "plan"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        check_writable(directory / "report.md", "--log.directory")
    except OSError as error:
        raise cannot_write(directory, error.strerror or str(error)) from None
    with display.waiting("compiling the step"):
        plan = compile_plan(c, target)
    if request.max_context:
        with display.waiting("searching for the longest rows that fit"):
            plan = replace(plan, max_context=max_context(c, target, display.print))
    with writing(directory):
        write_report(plan, directory)
    display.print(f"report: {directory / 'report.md'}")
    _write_json(request.json, plan.to_json())
    return plan


def _write_json(path: str | None, content: object) -> None:
    if path is not None:
        try:
            write_json(Path(path), content)
        except OSError as error:
            raise ValueError(f"cannot write --json {path} ({error.strerror}); use another") from None
