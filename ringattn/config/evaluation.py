"""What an evaluation asks of which runs: tasks, lengths, depths; it checks itself. Knows no arrays."""

from dataclasses import dataclass, field

from ringattn.config.checks import at_least, check_folder_name, check_types, require, unknown
from ringattn.config.sections import Layout, Mesh, Strategy
from ringattn.config.tasks import LOSSES, RETRIEVAL


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    name: str = "evaluation"
    """Name of the evaluation: its folder inside `evaluations/` of each run's own."""
    runs: tuple[str, ...] = ("runs/quickstart",)
    """Folders of runs, of each the newest checkpoint, or of checkpoints, such as runs/quickstart/checkpoints/400."""
    tasks: tuple[str, ...] = ("loss_by_position", "loss_by_context")
    """Losses (loss_by_position, loss_by_context, loss_by_kind) and retrieval (passkey, needle, multi_key, multi_value,
    multi_query, variables, common_words, frequent_words, lines, where_person, where_thing)."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Tokens in a row."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in a row what is asked for lies, from 0 (its beginning) to 1 (its end), for tasks that hide it there."""
    samples: int = 32
    """Rows of each task, length and depth, as far as there is text for them."""
    batch_size: int = 8
    """Rows that are computed at a time, over all devices."""
    longer: bool = False
    """Whether rows may be longer than those that a run was trained on."""
    seed: int = 0
    """Seed of the tasks, and of which text is taken."""
    path: str | None = None
    """Text for the losses, as data.path; None: what each run held out."""
    layout: Layout = "zigzag"
    """Order in which a row's tokens lie over the ring."""
    strategy: Strategy = "ring"
    """How queries meet all keys, as attention.strategy."""
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self) -> None:
        check_types(self)
        check_folder_name(self, "name")
        object.__setattr__(self, "depths", tuple(map(float, self.depths)))
        for task in self.tasks:
            if task not in LOSSES + RETRIEVAL:
                raise ValueError(f"tasks: {unknown(task, LOSSES + RETRIEVAL)} They are {', '.join(LOSSES + RETRIEVAL)}")
        for name in ("runs", "tasks", "lengths", "depths"):
            require(len(set(vars(self)[name])) == len(vars(self)[name]), self, name, "different from one another")
        require(min(self.lengths) >= 2, self, "lengths", "at least 2 each")
        require(all(0 <= depth <= 1 for depth in self.depths), self, "depths", "between 0 and 1 each")
        at_least(1, self, "samples", "batch_size")
        at_least(0, self, "seed")
        require(self.path != "", self, "path", "a file, a folder, a glob or 'stdlib', or None")
