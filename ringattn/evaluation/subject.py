"""A checkpoint to evaluate on any mesh, layout and strategy, independent of those used in training."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import jax
from flax import nnx

from ringattn import config
from ringattn.data import Tokenizer, find_tokenizer
from ringattn.evaluation.batches import ScoreFn
from ringattn.layout import check_length
from ringattn.mesh.axes import DATA, abstract, context_shards
from ringattn.mesh.devices import check_divisible
from ringattn.model.build import model_factory
from ringattn.model.scoring import make_scorer
from ringattn.runs.checkpoint import params_digest, read_params, saved_steps


@dataclass(frozen=True)
class Subject:
    """A run's checkpoint. Nothing is placed on devices before `load`."""

    name: str
    """The run's name, or 'name@step' if a step was specified."""
    directory: Path
    """The run directory."""
    step: int
    trained_length: int
    """Maximum number of tokens per row in training."""
    stage: config.Config
    """Config of the checkpoint's stage, with the evaluation's mesh, layout and strategy."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return find_tokenizer(self.stage.data, run_directory=self.directory)

    @cached_property
    def weights(self) -> str:
        """Digest of the parameters."""
        return params_digest(self.directory / "checkpoints", self.step)

    def check(self, c: config.Evaluation, mesh: jax.sharding.Mesh) -> None:
        """Raises ValueError if lengths, batch size or model do not fit the mesh, or if a length is too long."""
        for length in c.lengths:
            check_length(length, c.layout, context_shards(mesh), "lengths", "mesh.context_outer * mesh.context")
            if length > self.trained_length and not c.longer:
                trained = f"{self.name} was trained on rows of at most {self.trained_length} tokens"
                fix = f"use at most {self.trained_length}, or --longer True to allow longer rows"
                raise ValueError(f"lengths: {length}, but {trained}; {fix}")
        size = mesh.shape[DATA]
        if c.batch_size % size:
            fix = config.nearest_multiples(c.batch_size, size)
            raise ValueError(f"batch_size={c.batch_size} must be a multiple of mesh.data = {size}; use {fix}")
        data = config.Data(seq_len=c.lengths[0])
        train = replace(self.stage.train, batch_size=c.batch_size, accumulate=1)
        try:
            check_divisible(replace(self.stage, data=data, train=train), mesh)
        except ValueError as error:
            fix = "choose another --mesh.context, --mesh.data, --mesh.tensor or --strategy"
            raise ValueError(f"{self.name} cannot be evaluated on this mesh ({error}); {fix}") from error

    def load(self, mesh: jax.sharding.Mesh) -> ScoreFn:
        """Reads the parameters onto `mesh`. Call it under `jax.set_mesh(mesh)`. Raises ValueError on failure."""
        make_model = model_factory(self.stage, self.tokenizer.size)
        like = abstract(jax.eval_shape(jax.jit(lambda: nnx.split(make_model())[1])), mesh)
        params = read_params(self.directory / "checkpoints", self.step, like)
        return partial(make_scorer(make_model, self.tokenizer.size, mesh, self.stage.attention.layout), params)


def find_subject(path: str, c: config.Evaluation) -> Subject:
    """The checkpoint at `path`, or the newest one of the run directory `path`.

    Raises ValueError, with a fix, if it does not exist.
    """
    given = Path(path).expanduser()
    is_step = given.name.isdecimal() and given.parent.name == "checkpoints"
    directory = given.parent.parent if is_step else given.parent if given.name == "checkpoints" else given
    if not (directory / "config.json").is_file():
        found = sorted(file.parent for file in directory.parent.glob("*/config.json"))
        runs = [str(run) for run in found if saved_steps(run / "checkpoints")]
        fix = f"use one of {', '.join(runs)}" if runs else "train one with scripts/train.py"
        raise ValueError(f"runs: {directory} is not a run directory: config.json is missing; {fix}")
    run = config.load(directory / "config.json")
    steps = saved_steps(directory / "checkpoints")
    if not steps:
        fix = f"train it with python scripts/train.py --config {directory}/config.json"
        raise ValueError(f"runs: {directory} has no checkpoint; {fix}")
    step = int(given.name) if is_step else steps[0]
    if step not in steps:
        raise ValueError(f"runs: {directory} has no checkpoint {step}; use one of {', '.join(map(str, steps))}")
    number = run.stage_after(step - 1)
    trained_length = max(run.stage(earlier).data.seq_len for earlier in range(1, number + 1))
    stage = run.stage(number)
    attention = replace(stage.attention, layout=c.layout, strategy=c.strategy, kernel="auto")
    name = directory.resolve().name + f"@{step}" * is_step
    return Subject(name, directory, step, trained_length, replace(stage, mesh=c.mesh, attention=attention))
