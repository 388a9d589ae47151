"""Kills a run at random moments, resumes it each time, and compares it with an uninterrupted run.

    python tests/kill_runs.py --kills 40
    python tests/kill_runs.py --interval 300 --minutes 120

The first form chooses the moments: while the process starts and compiles, after a random step, while a checkpoint is
written, and during a validation. The second form kills at fixed times, stops the run by a signal after 120 minutes,
and also reports memory and open files. Both print a table of the kills, and exit with status 1 unless the losses of
all steps are bit for bit those of the uninterrupted run and no kill lost twice as many steps as lie between two
checkpoints. A kill while a checkpoint is written loses the steps since the one before.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from rich.console import Console
from rich.table import Table

from ringattn.runs.checkpoint import saved_steps
from ringattn.runs.metrics import Row, read_rows

ROOT = Path(__file__).parents[1]
CONFIG = """
from ringattn.config import Checkpoint, Config, Data, Log, Mesh, Model, Optimizer, Train, Validation

config = Config(
    model=Model(layers=2, dim=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128),
    data=Data(path={text!r}, seq_len=1024, validation=0.1),
    mesh=Mesh(context=2, simulate=2),
    optimizer=Optimizer(warmup_steps=10),
    train=Train(steps={steps}, batch_size=2),
    validation=Validation(every={validate_every}, batches=8),
    checkpoint=Checkpoint(every={every}),
    log=Log(every=1, directory={runs!r}),
)
"""
VALIDATE_EVERY = 25
MOMENTS = ("start", "compile", "step", "step", "save", "save", "validation")


class Kill(NamedTuple):
    """One kill of the run."""

    moment: str
    reached: int
    """Last step in metrics.jsonl."""
    saved: int
    """Newest checkpoint."""
    launch_seconds: float


class Launch:
    """A process of the run, whose output goes to a file."""

    processes: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, directory: Path, name: str):
        self.checkpoints, self.metrics = directory / "runs" / name / "checkpoints", directory / "runs" / name
        self.output = directory / f"{name}.txt"
        script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(directory / "config.py")]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        with self.output.open("w") as file:
            self.process = subprocess.Popen([*script, "--name", name], env=environ, stdout=file, stderr=file)
        self.start = time.monotonic()
        self.processes.append(self.process)

    @property
    def step(self) -> int:
        found = re.findall(r"^step (\d+)/", self.output.read_text(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def wait(self, happened: Callable[[], bool]) -> bool:
        """Waits until `happened` returns True. Returns False if the process ends first."""
        while self.process.poll() is None:
            if happened():
                return True
            time.sleep(0.002)
        return False

    def wait_for(self, moment: str, rng: random.Random, every: int) -> bool:
        """Waits for a random time within `moment`. Returns False if the process ends first."""
        if moment == "start":
            return self.wait_seconds(rng.uniform(0, 4))
        if not self.wait(lambda: "compiling the train step" in self.output.read_text()):
            return False
        if moment == "compile":
            return self.wait_seconds(rng.uniform(0, 3))
        target = max(saved_steps(self.checkpoints), default=0) + rng.randint(1, every + 5)
        if moment == "step":
            return self.wait(lambda: self.step >= target)
        if moment == "save":
            happened = self.wait(lambda: any(self.checkpoints.glob("*tmp*")))
        else:  # the validation begins after its step, whose row precedes it
            happened = self.wait(lambda: self.step > 0 and self.step % VALIDATE_EVERY == 0)
        return happened and self.wait_seconds(rng.uniform(0, 0.1))

    def wait_seconds(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() > end)

    def usage(self) -> tuple[float, int]:
        """Returns resident memory in MiB, and the number of open files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024, files

    def kill(self, moment: str) -> Kill:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        rows = read_rows(self.metrics / "metrics.jsonl")
        reached, saved = max((row["step"] for row in rows), default=0), max(saved_steps(self.checkpoints), default=0)
        return Kill(moment, reached, saved, time.monotonic() - self.start)


def losses(directory: Path, name: str) -> list[Row]:
    speeds = {"tokens_per_second", "step_seconds", "peak_bytes", "mfu"}
    rows = read_rows(directory / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in speeds} for row in rows]


def finish(launch: Launch) -> None:
    if launch.process.wait():
        raise SystemExit(f"a launch failed:\n{launch.output.read_text()}")


def killed(directory: Path, kills: int, every: int, rng: random.Random) -> list[Kill]:
    """Kills the run `kills` times at random moments, then completes it."""
    done: list[Kill] = []
    while len(done) < kills:
        moment, launch = rng.choice(MOMENTS), Launch(directory, "killed")
        if not launch.wait_for(moment, rng, every):
            finish(launch)  # the run was completed first
            break
        done.append(launch.kill(moment))
    finish(Launch(directory, "killed"))
    return done


def stop(launch: Launch) -> None:
    """Ends a launch by SIGTERM, which saves a checkpoint."""
    launch.process.terminate()
    if launch.process.wait() != 128 + signal.SIGTERM:
        raise SystemExit(f"a launch failed:\n{launch.output.read_text()}")


def soaked(directory: Path, interval: float, minutes: float, console: Console) -> list[Kill]:
    """Kills the run every `interval` seconds, then stops it. Prints memory and open files of each launch."""
    done: list[Kill] = []
    end = time.monotonic() + 60 * minutes
    while True:
        launch, samples = Launch(directory, "killed"), list[tuple[float, int]]()
        while time.monotonic() < min(end, launch.start + interval) or not launch.step:
            time.sleep(min(5.0, interval / 50))
            if launch.process.poll() is not None:
                raise SystemExit(f"a launch failed:\n{launch.output.read_text()}")
            if launch.step:
                samples.append(launch.usage())
        quarter = max(1, len(samples) // 4)
        for name, part in (("first", samples[quarter : 2 * quarter]), ("last", samples[-quarter:])):
            if part:
                memory, files = (statistics.median(values) for values in zip(*part, strict=True))
                line = f"launch {len(done) + 1}, step {launch.step}, {name} samples"
                console.print(f"{line}: {memory:.0f} MiB, {files:.0f} open files")
        if time.monotonic() > end:
            stop(launch)
            return done
        done.append(launch.kill("interval"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="number of kills at random moments")
    parser.add_argument("--steps", type=int, default=200, help="steps of the run, without --interval")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--interval", type=float, help="seconds between kills, instead of random moments")
    parser.add_argument("--minutes", type=float, default=120, help="length of the run with --interval")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        try:
            return compare(options, Path(name))
        finally:
            for process in Launch.processes:
                process.kill()
                process.wait()


def compare(options: argparse.Namespace, directory: Path) -> int:
    """Trains both runs in `directory` and prints the comparison. Returns the exit status."""
    console, every = Console(highlight=False, soft_wrap=True), options.every
    steps = 10_000_000 if options.interval else options.steps  # more than the minutes allow
    text, runs = str(ROOT / "ringattn"), str(directory / "runs")
    config = CONFIG.format(text=text, steps=steps, every=every, runs=runs, validate_every=VALIDATE_EVERY)
    (directory / "config.py").write_text(config)
    reference = Launch(directory, "uninterrupted")
    if options.interval:
        done = soaked(directory, options.interval, options.minutes, console)
        last = losses(directory, "killed")[-1]["step"]
        while reference.step < last and reference.process.poll() is None:
            time.sleep(1)
        stop(reference)
    else:
        finish(reference)
        done = killed(directory, options.kills, every, random.Random(options.seed))
    table = Table("kill", "moment", "last step", "newest checkpoint", "steps lost", "seconds of the launch")
    for number, kill in enumerate(done, 1):
        lost = kill.reached - kill.saved
        table.add_row(*map(str, (number, kill.moment, kill.reached, kill.saved, lost)), f"{kill.launch_seconds:.1f}")
    console.print(table)
    rows, expected = losses(directory, "killed"), losses(directory, "uninterrupted")
    if options.interval:  # a signal may have ended the validation of the last step
        last = rows[-1]["step"]
        rows, expected = ([row for row in each if row["step"] < last] for each in (rows, expected))
    most = max((kill.reached - kill.saved for kill in done), default=0)
    equal = rows == expected
    console.print(f"{len(done)} kills; at most {most} steps lost; {len(rows)} rows of metrics, equal: {equal}")
    return 0 if equal and most < 2 * every else 1


if __name__ == "__main__":
    sys.exit(main())
