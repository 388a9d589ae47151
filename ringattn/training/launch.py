"""Checks the data and the stages of a run before its first step, and chooses the values that they leave open."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from ringattn import config, weights
from ringattn.cost.minimum import check_free_memory
from ringattn.data import Splits, read
from ringattn.mesh.devices import build_mesh, check_divisible, check_kernel
from ringattn.mesh.processes import check_same
from ringattn.runs.checkpoint import saved_steps
from ringattn.runs.progress import Display
from ringattn.training.stage import rebatch


class Chosen(NamedTuple):
    """The config of a stage that leaves nothing open, and the reasons for the choice, one per line."""

    config: config.Config
    reasons: tuple[str, ...]


Choose = Callable[[config.Config, int, Callable[[str], None]], Chosen]
"""choose(c, vocabulary, say): chooses what the config of a stage leaves open, on the devices of this process.

`vocabulary` is the tokenizer's vocabulary size, and `say` takes lines about the progress. Must return the same in all
processes. `planning.choose` is one.
"""


def as_given(c: config.Config, vocabulary: int, say: Callable[[str], None]) -> Chosen:
    """Returns `c` as it is. Raises ValueError if a train step needs values that `c` leaves open."""
    rule = "takes a planner to choose"
    fix = "pass one, as scripts/train.py does: ringattn.training.train(c, ringattn.planning.choose)"
    if c.model.remat == "auto":
        raise ValueError(f"model.remat='auto' {rule}; {fix}")
    if c.mesh.auto:
        raise ValueError(f"mesh.auto=True {rule}; {fix}")
    return Chosen(c, ())


class Launch(NamedTuple):
    """Config and data of a launch, and the stages chosen so far."""

    config: config.Config
    splits: Splits
    origin: weights.Origin | None
    """The checkpoint that the run starts from."""
    choose: Choose
    stages: dict[int, Chosen]
    """The stages chosen so far, by number."""

    def stage(self, number: int) -> Chosen:
        """Returns the config of a stage, chosen once. Raises ValueError if it does not fit the devices."""
        if number not in self.stages:
            given = self.config.stage(number)
            chosen = self.choose(given, self.splits.tokenizer.size, Display(None).print)
            check_same("the choice of mesh, strategy and remat", repr(chosen.config))
            _check(chosen.config)
            self.stages[number] = chosen
        return self.stages[number]


def prepare_launch(c: config.Config, current: int, choose: Choose) -> Launch:
    """Reads the dataset once. Raises ValueError if a stage >= `current` does not fit the dataset or the devices."""
    launch, origin = None, _origin(c)
    tokenizer_directory = c.run_directory if saved_steps(c.run_directory / "checkpoints") else None
    for number in range(current, len(c.stages) + 1):
        with config.stage_errors(c.stages, number):
            stage = c.stage(number)
            check_kernel(stage, jax.default_backend())
            if launch is None:
                if not stage.mesh.auto:  # before reading the dataset, which can take minutes
                    _check(stage)
                splits = read(stage.data, tokenizer_directory, None if origin is None else origin.tokenizer(stage.data))
                for line in splits.notes:
                    Display(None).print(line)
                launch = Launch(c, splits, origin, choose, {})
            launch.stage(number)
            rebatch(launch.splits, stage, number)
    assert launch is not None
    return launch


def _check(stage: config.Config) -> None:
    """Raises ValueError if a stage does not divide over the devices, or if it cannot fit their free memory."""
    check_free_memory(stage, checked_mesh(stage))


def checked_mesh(stage: config.Config) -> jax.sharding.Mesh:
    """Returns the mesh of a stage. Raises ValueError if batch, sequence and parameters do not divide over it."""
    mesh = build_mesh(stage.mesh)
    check_divisible(stage, mesh)
    return mesh


def _origin(c: config.Config) -> weights.Origin | None:
    """Returns the checkpoint that the run starts from; None if there is none, or if the run has its own checkpoints."""
    if c.model.weights is None or saved_steps(c.run_directory / "checkpoints"):
        return None
    origin = weights.find_origin(c.model.weights)
    origin.check(c.model)
    if jax.process_count() > 1:
        check_same("model.weights", origin.digest())
    return origin
