"""Cases of `fuzz.py` with mutated configs and command lines, run through the scripts up to the first expensive step."""

import dataclasses
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from unittest import mock

from fuzz_outcome import Outcome, ReachedError, check_origin, judge
from mutations import WORDS, change_json, change_source, misspelt

from ringattn import config
from ringattn.config import command_line, files
from ringattn.data.formats import Document
from ringattn.training import stage as stages
from ringattn.training.step import abstract_state

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SCRIPTS: dict[type, tuple[str, ...]] = {
    config.Config: ("train", "train", "train", "plan", "prepare"),
    config.Evaluation: ("eval",),
    config.Generation: ("generate",),
    config.Benchmark: ("benchmark",),
}
"""Scripts that take each kind of config, as often as cases choose them."""
REAL = 0.025
"""Fraction of the cases that also run in a process of their own, as a user starts it."""
REAL_SECONDS = 30
SMALLER = ("--lengths", "16", "32", "--samples", "2")
"""Options that make evaluations fit the rows of the small run."""


PLAUSIBLE: dict[type, tuple[str, ...]] = {
    int: ("0", "1", "2", "3", "4", "8", "16", "64", "96", "256", "-1", "1000000", "9" * 18),
    float: ("0", "0.25", "0.5", "0.9", "1", "1.5", "4", "100", "10000", "1e-3", "1e-300", "1e300", "-1"),
    bool: ("True", "False"),
    str: (
        "bytes",
        "dna",
        "video",
        "stdlib",
        "task:needle",
        "task:passkey:16",
        "new",
        "runs/quickstart",
        "2:3",
        "v5e:2x2",
        "cpu:8",
    ),
    type(None): ("None",),
}
"""Words that options of these types may take."""


COMBINED: dict[str, tuple[str, ...]] = {
    "mesh.data": ("1", "2", "4", "8", "-1"),
    "mesh.context": ("1", "2", "3", "4", "8", "-1"),
    "mesh.context_outer": ("1", "2", "4", "-1"),
    "mesh.tensor": ("1", "2", "4", "8", "-1"),
    "mesh.auto": ("True", "False"),
    "attention.strategy": ("ring", "gather", "ulysses", "usp", "auto"),
    "attention.layout": ("contiguous", "striped", "zigzag"),
    "attention.kernel": ("auto", "xla", "pallas", "cudnn"),
    "data.seq_len": ("1", "2", "8", "16", "64", "96", "100", "256", "4096", "1000000000"),
    "data.overlap": ("0", "1", "15", "63"),
    "data.separate_documents": ("True", "False"),
    "data.path": (
        "stdlib",
        "stdlib task:needle",
        "task:needle",
        "task:needle:64",
        "task:mrcr:16",
        "task:variables:32",
        "runs",
    ),
    "data.mixture": ("1", "1 2", "1e-300 1", "1e308 1e308", "None"),
    "data.validation": ("0.05", "0.5", "1e-9", "0.999999"),
    "data.tokenizer": ("bytes", "dna", "video"),
    "train.batch_size": ("1", "2", "4", "8", "12", "1000000000"),
    "train.accumulate": ("1", "2", "3", "4", "1000000000"),
    "train.steps": ("1", "2", "2147483647"),
    "train.seed": ("0", "4294967296", "9223372036854775807"),
    "model.dim": ("1", "2", "8", "16", "20", "100000000"),
    "model.heads": ("1", "2", "3", "4", "8", "16"),
    "model.kv_heads": ("1", "2", "3", "4", "8"),
    "model.head_dim": ("2", "4", "6", "8", "100000000"),
    "model.head_groups": ("1", "2", "4"),
    "model.feed_forward": ("1", "2", "16", "20"),
    "model.vocabulary": ("1", "256", "257", "300", "1000000000", "None"),
    "model.window": ("0", "1", "16", "1073741824", "None"),
    "model.pattern": ("window", "full", "window full", "window window full", "None"),
    "model.family": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    "model.rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    "model.rope_factor": ("1.0", "1.0000000000000002", "4", "1e300"),
    "model.rope_theta": ("1.0000000000000002", "10000", "1e300"),
    "model.rope_original": ("1", "2", "8192", "9" * 30),
    "model.query_scale": ("1e-300", "1e300", "None"),
    "model.soft_cap": ("0", "1e-300", "50", "1e300"),
    "model.norm_epsilon": ("1e-300", "1e-6", "1e300"),
    "model.remat": ("off", "on", "offload", "offload_inputs", "offload_groups", "auto"),
    "model.dtype": ("float32", "bfloat16"),
    "model.tied": ("True", "False"),
    "optimizer.offload": ("True", "False"),
    "optimizer.warmup_steps": ("0", "1", "2147483647"),
    "optimizer.learning_rate": ("1e-300", "1e300"),
    "validation.batches": ("1", "1000000000"),
    "stages.1.steps": ("1", "3"),
    "stages.1.seq_len": ("16", "64", "100"),
}
"""Valid values of options that depend on one another."""


@cache
def script(name: str) -> ModuleType:
    """Returns scripts/<name>.py as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks for the source of its options
    spec.loader.exec_module(module)
    return module


@cache
def read(path: Path) -> Any:
    """Returns a committed config of any kind."""
    for kind in SCRIPTS:
        try:
            return files.read(path, kind)
        except ValueError as error:
            if " defines a" not in str(error):
                raise
    raise AssertionError(path)


@cache
def option_kinds(path: Path, name: str) -> dict[str, Any]:
    """Returns the types of the options of a script, by name, with a committed config."""
    module = script(name)
    options = module.Options if "Options" in vars(module) else config.Options
    return command_line._Parser(options(), read(path), vars(module).get("SECTIONS")).kinds


def value_words(rng: random.Random, kind: Any) -> list[str]:
    """Returns the words after an option of type `kind`: often wrong, sometimes plausible."""
    if rng.random() < 0.6:
        parts = [kind, *get_args(kind), *(part for each in get_args(kind) for part in get_args(each))]
        choices = [part for part in parts if isinstance(part, str)]
        for each, plausible in PLAUSIBLE.items():
            choices += plausible if each in parts else ()
        return [rng.choice(choices)] if choices else []
    return [rng.choice(WORDS) for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 1, 2, 3)))]


def change_words(rng: random.Random, kinds: dict[str, Any]) -> list[str]:
    """Returns options of a command line, with wrong values, names, repetitions and order."""
    words: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 5))):
        name = rng.choice(sorted(kinds))
        given = value_words(rng, kinds[name])
        if rng.random() < 0.12:
            name = rng.choice(
                (misspelt(rng, name), name.replace("_", "-"), name.upper(), name.rpartition(".")[2], "stages.9.steps")
            )
        part = [f"--{name}", *given]
        if rng.random() < 0.08:
            part = [f"--{name}={' '.join(given)}"]
        words += part
        if rng.random() < 0.06:
            words += part[:1] + value_words(rng, None)
        if rng.random() < 0.04:
            words.insert(
                rng.randrange(len(words) + 1), rng.choice((*WORDS, "--help", "-h", "--config", "--", "--version"))
            )
    return words


@dataclasses.dataclass
class Case:
    """A command line, to be run in `directory`."""

    kind: str
    script: str
    words: list[str]
    said: str
    """The problem with it."""


KINDS = {"options": 6, "combinations": 4, "json": 4, "python": 3, "resumed": 3, "convert": 1}
"""Kinds of cases, and their relative numbers."""


def make_case(rng: random.Random, directory: Path, fixtures: Path, kind: str) -> Case:
    """Draws a case of a kind and writes its files to `directory`."""
    path = rng.choice(CONFIGS)
    name = rng.choice(SCRIPTS[type(read(path))])
    if kind == "convert":
        return _convert_case(rng, fixtures)
    if kind == "resumed":
        shutil.copytree(fixtures / "runs" / "fuzzed", directory / "runs" / "quickstart")
        return _resumed_case(rng, directory)
    if kind == "combinations":
        words = _combination(rng)
        return Case(kind, "train", ["--config", str(ROOT / "configs" / "quickstart.py"), *words], " ".join(words))
    runs = {Path(run).name for run in vars(read(path)).get("runs") or ()} | {"quickstart"}  # finetune.py starts from it
    for run in sorted(runs) if (fixtures / "runs").is_dir() and (name == "eval" or path.stem == "finetune") else ():
        shutil.copytree(fixtures / "runs" / "fuzzed", directory / "runs" / run)
    base = _base_words(rng, name, fixtures)
    if kind == "options":
        words = change_words(rng, option_kinds(path, name))
        return Case(kind, name, ["--config", str(path), *base, *words], f"{path.name}: {words!r:.300}")
    if rng.random() < 0.1:
        name = rng.choice(("train", "eval", "generate", "benchmark", "plan", "prepare"))
    if kind == "json":
        said, content = change_json(rng, config.to_json(read(path)).encode())
        file = directory / "config.json"
        file.write_bytes(content)
        return Case(kind, name, ["--config", str(file), *base], f"{path.name} as JSON: {said}")
    for other in CONFIGS:
        shutil.copy(other, directory)
    said, text = change_source(rng, path.read_text(encoding="utf-8"))
    (directory / path.name).write_bytes(text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16")), "surrogatepass"))
    return Case("python", name, ["--config", str(directory / path.name), *base], f"{path.name}: {said}")


def _base_words(rng: random.Random, name: str, fixtures: Path) -> list[str]:
    """Returns options that let a case of a script get further than the check of its first options."""
    if rng.random() < 0.1:
        return []
    if name == "eval":
        return list(SMALLER) if rng.random() < 0.7 else []
    if name == "generate":
        path = rng.choice(("runs/fuzzed", "model", "model.gguf"))
        return ["--prompt", "a", "--weights", str(fixtures / path)]
    if name == "prepare":
        return ["--data.path", str(fixtures / "text.txt"), "--output", "shards"]
    if name == "plan":
        return ["--topology", rng.choice(("cpu:8", "cpu:8", "cpu:8", "cpu:4", *WORDS, "v5e:2x4", "h100:8"))]
    if name == "train" and rng.random() < 0.1:
        return ["--model.weights", str(fixtures / rng.choice(("runs/fuzzed", "model", "model.gguf")))]
    return []


def _combination(rng: random.Random) -> list[str]:
    """Returns options whose values are valid, each by itself."""
    words = ["--name", "combined", "--mesh.simulate", "8", "--model.layers", rng.choice("1234")]
    for name in rng.sample(sorted(COMBINED), rng.choice((2, 3, 4, 6, 8))):
        words += [f"--{name}", *rng.choice(COMBINED[name]).split()]
    return words


def _convert_case(rng: random.Random, fixtures: Path) -> Case:
    sources = [
        str(fixtures / path) for path in ("model", "model.gguf", "runs/fuzzed", "runs/fuzzed/checkpoints/2", "text.txt")
    ]
    words = [
        rng.choice(sources if rng.random() < 0.7 else WORDS),
        rng.choice(WORDS) if rng.random() < 0.3 else "target",
    ]
    if rng.random() < 0.7:
        words += ["--to", rng.choice(WORDS) if rng.random() < 0.3 else rng.choice(("run", "huggingface"))]
    if rng.random() < 0.3:
        words.insert(rng.randrange(len(words) + 1), rng.choice((*WORDS, "--help", "--ot", "--to")))
    return Case("convert", "convert", words, f"{words!r:.300}")


def _resumed_case(rng: random.Random, directory: Path) -> Case:
    """A run that is resumed with another config than it was trained with, or whose config.json is damaged."""
    run = directory / "runs" / "quickstart"
    trained = json.loads((run / "config.json").read_bytes()) | {"name": "quickstart"}
    trained["log"]["directory"] = str(directory / "runs")
    content = json.dumps(trained, indent=2).encode()
    (run / "config.json").write_bytes(content)
    said, changed = change_json(rng, content)
    (directory / "config.json").write_bytes(content)
    words = ["--config", str(directory / "config.json")]
    if rng.random() < 0.5:
        (run / "config.json").write_bytes(changed)
        said = f"config.json of the run: {said}"
    elif rng.random() < 0.5:
        (directory / "config.json").write_bytes(changed)
        said = f"config of the resumed run: {said}"
    else:
        kinds = option_kinds(ROOT / "configs" / "quickstart.py", "train")
        added = change_words(rng, kinds)
        words, said = [*words, *added], f"resumed with {added!r:.300}"
    if rng.random() < 0.2:
        (run / "checkpoints" / rng.choice(("7", "x", "0", "9" * 25, "-3", "damaged-2"))).mkdir()
    return Case("resumed", "train", words, said)


def run_case(case: Case, directory: Path, main: Callable[[str, list[str]], None]) -> Outcome:
    """Runs a case in the current process, with `directory` as current directory."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        return judge(lambda: main(case.script, case.words))
    finally:
        os.chdir(before)


def call_main(name: str, words: list[str]) -> None:
    module = script(name)
    with mock.patch.object(sys, "argv", [f"scripts/{name}.py", *words]):
        sys.exit(module.main())


def run_really(case: Case, directory: Path) -> Outcome:
    """Runs a case as a user does. Whatever is still computing at the end of `REAL_SECONDS` counts as accepted."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(directory)}
    command = [sys.executable, str(ROOT / "scripts" / f"{case.script}.py"), *case.words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=directory, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            status = process.wait(REAL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 0
        err.seek(0)
        lines = err.read().decode(errors="replace").strip().splitlines()
    if any("Traceback" in line for line in lines) or status not in (0, 1, 2):
        return Outcome("finding", f"a process with status {status}: {' / '.join(lines[-3:])}")
    if status == 2 and not (lines and lines[-1].startswith("error: ") and sum("error: " in x for x in lines) == 1):
        return Outcome("finding", f"a process with status 2 and not one line of error: {' / '.join(lines[-3:])}")
    return Outcome("refused" if status == 2 else "accepted", lines[-1] if lines else "")


def config_case(
    rng: random.Random, directory: Path, fixtures: Path, kind: str | None = None, real: float = REAL
) -> tuple[Case, Outcome]:
    """Draws and runs a case, of `kind` unless it is None. A fraction `real` of the cases also run in a process."""
    case = make_case(rng, directory, fixtures, kind or rng.choices(list(KINDS), list(KINDS.values()))[0])
    really = rng.random() < real
    copy = directory.with_name(directory.name + "-process")
    if really:
        shutil.copytree(directory, copy)
    outcome = run_case(case, directory, call_main)
    if really and outcome.status != "finding":
        words = [word.replace(str(directory), str(copy)) for word in case.words]
        outcome = run_really(dataclasses.replace(case, words=words), copy)
        case.kind += ", process"
    return case, outcome


@contextmanager
def shallow() -> Iterator[None]:
    """Ends scripts, inside the context, by `ReachedError` where all checks are done and the computation would begin."""

    def reached(*arguments: Any, **options: Any) -> Any:
        raise ReachedError

    def prepare_stage(*arguments: Any) -> Any:
        run = stages.prepare_stage(*arguments)
        c = run.config
        if c.model.layers <= 64:
            state = abstract_state(run.initial_state, run.mesh, c.optimizer.offload)
            if c.model.layers <= 2 and c.data.seq_len <= 256:  # tracing takes a second
                run.train_step.lower(state, run.place(run.training.batch(0)))
        raise ReachedError

    def standard_library() -> Iterator[Document]:
        for number in range(64):
            yield Document(f"stdlib/{number}.py", f"def f{number}(x):\n    return x * {number}\n".encode() * 100)

    def parse_with(*arguments: Any, **options: Any) -> Any:
        options, c = command_line_parse(*arguments, **options)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "config.json"
            file.write_text(config.to_json(c), encoding="utf-8")
            assert files.load(file, type(c)) == c, "config.json does not restore the config"
        return options, c

    @contextmanager
    def checked_errors() -> Iterator[None]:
        with reported_errors():
            try:
                yield
            except ValueError as error:
                check_origin(error)
                raise

    command_line_parse, reported_errors = command_line.parse_with, command_line.reported_errors
    replaced = {
        "ringattn.config.reported_errors": checked_errors,
        "ringattn.config.command_line.reported_errors": checked_errors,
        "ringattn.config.parse_with": parse_with,
        "ringattn.config.command_line.parse_with": parse_with,
        "ringattn.training.loop.prepare_stage": prepare_stage,
        "ringattn.data.sources._standard_library": standard_library,
        "ringattn.data.dataset.TASK_TOKENS": 2**14,
        "ringattn.evaluation.cells._results": reached,
        "ringattn.generation.generator.Generator.of": reached,
        "ringattn.planning.cache.Cache.plan": reached,
        "ringattn.planning.choice.rank_step": reached,
        "ringattn.planning.decoding.lower_decode": reached,
        "ringattn.planning.choice.rank": reached,
        "ringattn.benchmark.measure.measure": reached,
        "ringattn.benchmark.cycles._Count.schedule": reached,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        yield
