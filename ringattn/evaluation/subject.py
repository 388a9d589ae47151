"""What is evaluated: a checkpoint of a run, on any mesh, layout and strategy, whatever it was trained with."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import jax
from flax import nnx

from ringattn import config
from ringattn.data import Tokenizer, find_tokenizer
from ringattn.evaluation.scoring import Score
from ringattn.layout import check_length
from ringattn.mesh import DATA, abstract, check, shards
from ringattn.training.checkpoint import params_digest, read_params, saved_steps
from ringattn.training.run import model_of
from ringattn.training.score import make_scorer


@dataclass(frozen=True)
class Subject:
    """A run's checkpoint; nothing of it is on a device before it is asked to score."""

    name: str
    """The run's name, with the step where that was asked for."""
    folder: Path
    """The run's."""
    step: int
    trained: int
    """Tokens of the longest rows that it was trained on."""
    stage: config.Config
    """Of the stage that the checkpoint is of, but for mesh, layout and strategy, which are the evaluation's."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return find_tokenizer(self.stage.data, kept=self.folder)

    @cached_property
    def weights(self) -> str:
        """What stands for its weights."""
        return params_digest(self.folder / "checkpoints", self.step)

    def check(self, c: config.Evaluation, mesh: jax.sharding.Mesh) -> None:
        """Raises ValueError, with a cure, if it cannot be evaluated on `mesh` as `c` asks."""
        for length in c.lengths:
            check_length(length, c.layout, shards(mesh), "lengths")
            if length > self.trained and not c.longer:
                cure = f"use at most {self.trained}, or --longer True to see how it does beyond"
                raise ValueError(f"lengths: {length}, but {self.name} was trained on rows of {self.trained}: {cure}")
        data = mesh.shape[DATA]
        if c.batch_size % data:
            cure = config.nearest_multiples(c.batch_size, data)
            raise ValueError(f"batch_size={c.batch_size} must be a multiple of mesh.data = {data}: use {cure}")
        rows = config.Data(seq_len=c.lengths[0])
        train = replace(self.stage.train, batch_size=c.batch_size, accumulate=1)
        try:
            check(replace(self.stage, data=rows, train=train), mesh)
        except ValueError as error:
            cure = "choose another --mesh.context, --mesh.data, --mesh.tensor or --strategy"
            raise ValueError(f"{self.name} cannot be evaluated on this mesh ({error}): {cure}") from error

    def loaded(self, mesh: jax.sharding.Mesh) -> Score:
        """Puts its weights on `mesh`, under which this is called. Raises ValueError if they cannot be read."""
        make_model = model_of(self.stage, self.tokenizer.size)
        like = abstract(jax.eval_shape(jax.jit(lambda: nnx.split(make_model())[1])), mesh)
        params = read_params(self.folder / "checkpoints", self.step, like)
        return partial(make_scorer(make_model, self.tokenizer.size, mesh, self.stage.attention.layout), params)


def find(path: str, c: config.Evaluation) -> Subject:
    """The newest checkpoint of the run in folder `path`, or the checkpoint whose folder that is.

    Raises ValueError, with a cure, if there is none.
    """
    place = Path(path).expanduser()
    asked = place.name.isdecimal() and place.parent.name == "checkpoints"
    folder = place.parent.parent if asked else place.parent if place.name == "checkpoints" else place
    if not (folder / "config.json").is_file():
        near = sorted(each.parent.name for each in folder.parent.glob("*/config.json"))
        there = f"there are {', '.join(near)}" if near else "train one by scripts/train.py"
        raise ValueError(f"runs: {folder} holds no run, for it has no config.json: {there}")
    whole = config.load(folder / "config.json")
    steps = saved_steps(folder / "checkpoints")
    if not steps:
        raise ValueError(f"runs: {folder} has no checkpoint: python scripts/train.py --config {folder}/config.json")
    step = int(place.name) if asked else steps[0]
    if step not in steps:
        raise ValueError(f"runs: {folder} has no checkpoint {step}: there are {', '.join(map(str, steps))}")
    number = whole.stage_after(step - 1)
    trained = max(whole.stage(each).data.seq_len for each in range(1, number + 1))
    stage = whole.stage(number)
    attention = replace(stage.attention, layout=c.layout, strategy=c.strategy)
    name = f"{folder.resolve().name}@{step}" if asked else folder.resolve().name
    return Subject(name, folder, step, trained, replace(stage, mesh=c.mesh, attention=attention))
