"""Mutated configs, command lines and files: each must be accepted, or refused in one line.

    python tests/fuzz.py --cases 2000 --files 500 --seed 0
    python tests/fuzz.py --seed 0 --only config:17 file:3

A finding is any other exception than the project's ValueError, a message of several lines, more than 30 s, more than
3 GiB of memory, or a changed file that is accepted although a checksum tells. Prints a table and the findings, and
exits with status 1 if there are any. Cases run in forked processes, so that a crash or a hang is a finding too.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

SECONDS, MEMORY = 30.0, 3 * 2**30
"""Limits of a case."""
KILL_SECONDS = 90.0
"""A case that takes longer is killed. Longer than SECONDS, because some cases also start a process."""
ADDRESSES = 16 * 2**30
"""Bytes of addresses that a process of cases may add."""
PER_PROCESS = 40
Report = dict[str, Any]
"""kind, said, status, message, seconds and bytes of a case."""


class Worker(NamedTuple):
    pid: int
    pipe: int


def prepare_environment() -> None:
    """Sets what JAX reads when it is imported."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"MPLBACKEND": "agg", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)


def run_case(name: str, seed: int, work: Path, fixtures: Path) -> Report:
    """Runs the case `name`, such as 'config:17', in the current process. The same seed gives the same case."""
    import fuzz_configs
    import fuzz_files

    rng, directory = random.Random(f"{seed} {name}"), work / name.replace(":", "-") / "here"
    directory.mkdir(parents=True)
    before, began = peak_bytes(reset=True), time.monotonic()
    try:
        if name.startswith("config"):
            case, outcome = fuzz_configs.config_case(rng, directory, fixtures)
            kind, said = case.kind, f"{case.script}.py {case.said}"
        else:
            kind, said, outcome = fuzz_files.file_case(rng, directory, fixtures)
    finally:
        shutil.rmtree(directory.parent, ignore_errors=True)
    seconds, added = time.monotonic() - began, peak_bytes() - before
    report = {"kind": kind, "said": said, "status": outcome.status, "message": outcome.message}
    if seconds > SECONDS and not kind.endswith("process"):
        report |= {"status": "finding", "message": f"took {seconds:.0f} s"}
    elif added > MEMORY:
        report |= {"status": "finding", "message": f"took {added / 2**30:.1f} GiB: {outcome.message}"}
    return report | {"seconds": seconds, "bytes": added}


def peak_bytes(reset: bool = False) -> int:
    """Returns the largest memory of the process since the last reset; with `reset`, that of now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def start_worker(names: Sequence[str], seed: int, work: Path, fixtures: Path) -> Worker:
    """Forks a process that runs the cases `names`, and writes a line to a pipe at the begin and end of each."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Worker(pid, reading)
    status = 1
    try:
        os.close(reading)
        os.setpgid(0, 0)
        with (work / "output.txt").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            _run_cases(names, seed, work, fixtures, lambda line: pipe.write(json.dumps(line).encode() + b"\n"))
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _run_cases(names: Sequence[str], seed: int, work: Path, fixtures: Path, write: Callable[[Report], object]) -> None:
    import fuzz_configs
    import jax

    jax.devices()
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    for name in names:
        write({"begun": name})
        faulthandler.dump_traceback_later(KILL_SECONDS - 5, file=2)  # the message of a hang
        with fuzz_configs.shallow() if name.startswith("config") else nullcontext():
            write(run_case(name, seed, work, fixtures))


def run_all(names: Sequence[str], seed: int, work: Path, fixtures: Path, everything: bool) -> dict[str, Report]:
    """Runs the cases in forked processes, one process at a time, and prints findings, or all with `everything`.

    Returns the reports of the cases by name.
    """
    pending, reports = list(names), dict[str, Report]()

    def add(name: str, report: Report) -> None:
        reports[name] = report
        if everything or report["status"] == "finding":
            shown = f"{name} --seed {seed}, {report['status']} ({report['kind']}): {report['said']}"
            print(f"{shown}\n    {report['message']}\n", flush=True)

    while pending:
        worker, lines, current = start_worker(pending[:PER_PROCESS], seed, work, fixtures), b"", ""
        while True:
            ready = select.select([worker.pipe], [], [], KILL_SECONDS)[0]
            content = os.read(worker.pipe, 2**20) if ready else b""
            if not content:
                break
            *complete, lines = (lines + content).split(b"\n")
            for line in map(json.loads, complete):
                if "begun" in line:
                    current = line["begun"]
                else:
                    add(current, line)
        if not ready:
            os.killpg(worker.pid, signal.SIGKILL)
        status = os.waitpid(worker.pid, 0)[1]
        if current not in reports or not current:
            current = current or pending[0]
            tail = (work / "output.txt").read_text(errors="replace")[-1500:]
            problem = f"ended with status {status}: {tail}" if ready else f"hung for {KILL_SECONDS:.0f} s: {tail}"
            report = {"kind": current.partition(":")[0], "said": "", "status": "finding", "message": problem}
            add(current, report | {"seconds": KILL_SECONDS * (not ready), "bytes": 0})
            shutil.rmtree(work / current.replace(":", "-"), ignore_errors=True)
        pending = [name for name in pending if name not in reports]
    return reports


def table(reports: dict[str, Report]) -> list[str]:
    """Returns the lines of the table of all kinds."""
    kinds: dict[str, list[Report]] = defaultdict(list)
    for name, report in reports.items():
        kinds[f"{name.partition(':')[0]}: {report['kind']}"].append(report)
    rows = [f"{'kind':<28} {'cases':>6} {'accepted':>9} {'refused':>8} {'findings':>9} {'slowest':>8} {'memory':>9}"]
    for kind, group in [*sorted(kinds.items()), ("all", list(reports.values()))]:
        counts = [sum(report["status"] == status for report in group) for status in ("accepted", "refused", "finding")]
        slowest, most = (max((report[name] for report in group), default=0) for name in ("seconds", "bytes"))
        numbers = f"{counts[0]:>9} {counts[1]:>8} {counts[2]:>9} {slowest:>6.1f} s {most / 2**20:>5.0f} MiB"
        rows.append(f"{kind:<28} {len(group):>6} {numbers}")
    return rows


def make_files(base: Path) -> int:
    """Creates the intact files in a forked process, which needs devices. Returns its exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    status = 1
    try:
        import fuzz_files
        import fuzz_fixtures

        with (base / "output.txt").open("wb") as output:
            os.dup2(output.fileno(), 1)
        fuzz_fixtures.make_fixtures(base)
        (base / "expected.json").write_text(json.dumps(fuzz_files.expected(base, base / "work")))
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main(arguments: argparse.Namespace) -> int:
    prepare_environment()
    import fuzz_configs  # noqa: F401  the forked processes inherit all imports
    import fuzz_files  # noqa: F401
    import fuzz_fixtures  # noqa: F401

    faulthandler.enable()  # the message of a crash
    began = time.monotonic()
    names = [f"config:{number}" for number in range(arguments.cases)]
    names += [f"file:{number}" for number in range(arguments.files)]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        base, work = Path(temporary) / "intact", Path(temporary) / "work"
        base.mkdir()
        work.mkdir()
        if make_files(base):
            print("the intact files could not be made")
            return 1
        print(f"intact files made in {time.monotonic() - began:.0f} s", flush=True)
        everything = arguments.verbose or bool(arguments.only)
        reports = run_all(arguments.only or names, arguments.seed, work, base, everything)
    findings = {name: report for name, report in reports.items() if report["status"] == "finding"}
    print("", *table(reports), f"{time.monotonic() - began:.0f} s", sep="\n")
    return int(bool(findings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="configs and command lines (default: %(default)s)")
    parser.add_argument("--files", type=int, default=500, help="files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="*", default=(), metavar="CASE", help="run only these, such as config:17 file:3"
    )
    parser.add_argument("--verbose", action="store_true", help="print every case")
    sys.exit(main(parser.parse_args()))
