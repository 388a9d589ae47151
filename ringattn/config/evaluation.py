"""Config of an evaluation: runs, tasks, lengths and depths."""

from dataclasses import field

from ringattn.config.checks import (
    at_least,
    check_directory_name,
    check_distinct,
    check_types,
    require,
    section,
    unknown,
)
from ringattn.config.choices import Layout, Scoring, Strategy
from ringattn.config.model import Model
from ringattn.config.sections import Mesh
from ringattn.config.tasks import GENERATED, LOSSES, RETRIEVAL


@section()
class Evaluation:
    name: str = "evaluation"
    """Name of the evaluation and of its directory in each run's `evaluations/`."""
    runs: tuple[str, ...] | None = ("runs/quickstart",)
    """Run directories (evaluates the newest checkpoint) or checkpoints, such as runs/quickstart/checkpoints/400. With
    model.weights, the default is None."""
    tasks: tuple[str, ...] = ("loss_by_position", "loss_by_context")
    """Tasks to run. loss_by_position: loss by position in the row; loss_by_context: loss of the same tokens by context
    length; loss_by_kind: loss by kind of document, such as .py. Retrieval tasks: passkey, needle, multi_key,
    multi_value, multi_query, variables, common_words, frequent_words, lines, where_person, where_thing, mrcr."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Row lengths in tokens. Each task runs at each length."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Positions of the needle in the row, from 0 (start) to 1 (end), for tasks with a needle."""
    samples: int = 32
    """Number of rows per task, length and depth; fewer if the text is too short."""
    batch_size: int = 8
    """Global batch size: rows per batch."""
    scoring: Scoring = "logits"
    """Scoring of retrieval tasks. logits: exact match, if each token of the answer is the most likely one; generation:
    the model generates its answer, which is scored as published by RULER or MRCR. Layout and strategy have no effect on
    generation. mrcr requires generation."""
    chat: bool = False
    """Ask retrieval tasks as a user, in the chat template of an instruct model. Losses do not use the template."""
    longer: bool = False
    """Allow rows longer than a run's training rows."""
    seed: int = 0
    """Seed of the generated tasks and of the text selection."""
    path: str | None = None
    """Text for the losses, as in data.path of a training config. None: the held-out text of each run."""
    layout: Layout = "zigzag"
    """Order of a row's tokens over the devices, as in attention.layout of a training config."""
    strategy: Strategy = "ring"
    """Communication strategy, as in attention.strategy of a training config."""
    model: Model = field(default_factory=Model)
    """Model to evaluate instead of runs, if model.weights is set."""
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self) -> None:
        check_types(self)
        check_directory_name(self, "name")
        object.__setattr__(self, "depths", tuple(map(float, self.depths)))
        for task in self.tasks:
            if task not in LOSSES + RETRIEVAL:
                valid = ", ".join(LOSSES + RETRIEVAL)
                raise ValueError(f"tasks: {unknown(task, LOSSES + RETRIEVAL)} (valid: {valid})")
        check_distinct(self, "tasks", "lengths", "depths")
        self._check_scoring()
        if self.runs is not None:
            check_distinct(self, "runs")
        if self.model.weights is None:
            for name, value in vars(Model()).items():
                rule = f"{value!r} without model.weights: a run is evaluated with its own model section"
                require(vars(self.model)[name] == value, self.model, name, rule)
        given = self.runs is not None or self.model.weights is not None
        require(given, self, "runs", "one or more run directories, or set model.weights")
        require(min(self.lengths) >= 2, self, "lengths", "at least 2 each")
        require(all(0 <= depth <= 1 for depth in self.depths), self, "depths", "between 0 and 1 each")
        at_least(1, self, "samples", "batch_size", at_most=10**6)  # a list of all samples is kept in memory
        at_least(0, self, "seed")
        require(self.path != "", self, "path", "a file, a directory, a glob or 'stdlib', or None")

    def _check_scoring(self) -> None:
        """Raises ValueError if `scoring` does not fit the tasks."""
        generated = [task for task in self.tasks if task in GENERATED]
        if self.scoring == "logits" and generated:
            raise ValueError(f"tasks: {generated[0]} is scored on generated answers; use --scoring generation")
        if self.scoring == "generation" and not set(self.tasks) & set(RETRIEVAL):
            rule = "requires a retrieval task, such as needle, because losses are computed from logits"
            raise ValueError(f"scoring='generation' {rule}; add one to --tasks, or use --scoring logits")
