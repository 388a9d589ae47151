"""Sections of a training config. They validate their values; `--help` shows the fields' docstrings."""

from dataclasses import field
from pathlib import Path

from ringattn.config.checks import (
    at_least,
    check_directory_name,
    check_types,
    nearest_multiples,
    option,
    require,
    section,
)
from ringattn.config.choices import KernelName, Layout, Resume, Strategy
from ringattn.config.model import Model
from ringattn.config.stages import Stage, stage_errors, with_values
from ringattn.config.tasks import TASK, check_task


@section("data.")
class Data:
    path: str | tuple[str, ...] = "stdlib"
    """Training data: a file, a directory, a glob, token shards, 'stdlib' (the source of Python's standard library) or
    a retrieval task: 'task:needle' (one document per row) or 'task:needle:128' (128 tokens per document). Supports
    several values."""
    mixture: tuple[float, ...] | None = None
    """Proportions in which rows are drawn from several paths, such as 7 3. None: every row once per epoch."""
    tokenizer: str = "bytes"
    """'bytes', 'dna', 'video' (learns a codebook), or the path of a tokenizer.json or codebook.npy."""
    seq_len: int = 2048
    """Tokens per row (L)."""
    overlap: int = 0
    """Number of tokens by which consecutive rows of one document overlap. Overlapping tokens count once in the loss."""
    separate_documents: bool = True
    """Tokens attend only within their document. False: a row is one sequence, across the boundaries of its documents;
    kernel cudnn (GPU) needs this."""
    frame_size: tuple[int, ...] = (32, 48)
    """Height and width to which video frames are resized; multiples of 4, because a token is a 4 x 4 patch."""
    validation: float = 0.05
    """Fraction of the tokens of each path that is held out for validation: whole documents, or the end of one."""

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.paths) == 1:  # so that configs with path="a" and path=("a",) compare equal
            object.__setattr__(self, "path", self.paths[0])
        rule = "a file, a directory, a glob, token shards, 'stdlib' or a task, such as 'task:needle'"
        require(all(self.paths), self, "path", rule)
        for path in self.paths:
            if path.startswith(TASK):
                check_task(path, self.seq_len)
        if self.mixture is not None:
            proportions = f"one positive number per path of data.path ({len(self.paths)}), or None"
            object.__setattr__(self, "mixture", tuple(map(float, self.mixture)))
            require(len(self.mixture) == len(self.paths) and min(self.mixture) > 0, self, "mixture", proportions)
        rule = "'bytes', 'dna', 'video' or the path of a tokenizer.json or codebook.npy"
        require(bool(self.tokenizer), self, "tokenizer", rule)
        at_least(1, self, "seq_len")
        at_least(0, self, "overlap")
        require(self.overlap < self.seq_len, self, "overlap", f"less than {option('data.seq_len')}={self.seq_len}")
        rule = "a height and a width, each a multiple of 4, such as 32 48"
        valid = len(self.frame_size) == 2 and all(side > 0 and side % 4 == 0 for side in self.frame_size)
        require(valid, self, "frame_size", rule)
        require(0 < self.validation < 1, self, "validation", "between 0 and 1, such as 0.05")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple, even for a single path."""
        return (self.path,) if isinstance(self.path, str) else self.path


@section("mesh.")
class Mesh:
    data: int = 1
    """Number of devices over which the batch is sharded; -1: the remaining devices."""
    context_outer: int = 1
    """Size of the outer context axis: the outer ring of a nested ring, or the ring of strategy usp. Each row is sharded
    over context_outer * context devices. -1: the remaining devices."""
    context: int = -1
    """Size of the context axis. Each row is sharded over context_outer * context devices. -1: the remaining devices."""
    tensor: int = 1
    """Number of devices over which heads, feed-forward and vocabulary are sharded; -1: the remaining devices."""
    auto: bool = False
    """Choose the sizes of all four axes by estimated step time and by memory. Leave the axes out. In evaluation and
    generation: all devices on axis context."""
    simulate: int = 0
    """Number of simulated CPU devices. 0: use the real devices."""

    def __post_init__(self) -> None:
        check_types(self)
        sizes = {name: size for name, size in vars(self).items() if name not in ("auto", "simulate")}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, self, name, "at least 1, or -1 for the remaining devices")
        inferred = [option(f"mesh.{name}") for name, size in sizes.items() if size == -1]
        if len(inferred) > 1:
            values = " and ".join(f"{name}=-1" for name in inferred)
            raise ValueError(f"{values}: only one axis can take the remaining devices; use --{inferred[0]} 1")
        at_least(0, self, "simulate")
        defaults = {"data": 1, "context_outer": 1, "context": -1, "tensor": 1}
        given = [name for name, size in sizes.items() if self.auto and size != defaults[name]]
        if given:
            values = " and ".join(f"{option(f'mesh.{name}')}={sizes[name]}" for name in given)
            fix = " ".join(f"--{option(f'mesh.{name}')} {defaults[name]}" for name in given)
            raise ValueError(f"{values} must be left out with mesh.auto=True; use {fix}, or --mesh.auto False")


@section("attention.")
class Attention:
    layout: Layout = "zigzag"
    """Order of a row's tokens across devices. zigzag and striped balance causal attention."""
    strategy: Strategy = "ring"
    """Communication strategy. ring: K/V rotate; gather: K/V are all-gathered; ulysses: all-to-all between sequence and
    heads; usp: ulysses over mesh.context, ring over mesh.context_outer; auto: the fastest by estimate."""
    kernel: KernelName = "auto"
    """Attention kernel. auto: the fastest for the device; xla: any device; pallas: TPU; cudnn: GPU."""

    def __post_init__(self) -> None:
        check_types(self)


@section("optimizer.")
class Optimizer:
    learning_rate: float = 3e-3
    """Peak learning rate, after linear warmup and before cosine decay."""
    warmup_steps: int = 20
    """Number of warmup steps. A run with fewer steps ends during warmup."""
    final_fraction: float = 0.1
    """Final learning rate as a fraction of the peak."""
    weight_decay: float = 0.1
    """AdamW weight decay, applied to matrices only."""
    beta1: float = 0.9
    """AdamW decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW decay rate of the second moment."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it."""
    offload: bool = False
    """Keep AdamW's moments in host memory, except during the update."""
    skip_spikes: float | None = None
    """Skip updates whose gradient norm exceeds this factor times its recent mean, or is not finite. None: skip none."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.learning_rate > 0, self, "learning_rate", "positive, such as 0.003")
        at_least(0, self, "warmup_steps", "weight_decay", at_most=2**31 - 1)  # JAX counts steps in int32
        require(0 <= self.final_fraction <= 1, self, "final_fraction", "between 0 and 1, such as 0.1")
        for name, decay in {"beta1": self.beta1, "beta2": self.beta2}.items():
            require(0 <= decay < 1, self, name, "at least 0 and less than 1, such as 0.9")
        require(self.clip_norm > 0, self, "clip_norm", "positive, such as 1.0")
        rule = "more than 1, such as 10.0, or None"
        require(self.skip_spikes is None or self.skip_spikes > 1, self, "skip_spikes", rule)


@section("train.")
class Train:
    steps: int = 200
    """Number of optimizer updates."""
    batch_size: int = 4
    """Global batch size: rows per update."""
    accumulate: int = 1
    """Number of microbatches per update (gradient accumulation); must divide batch_size."""
    seed: int = 0
    """Seed of the initialization and of the data order."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "steps", at_most=2**31 - 1)
        at_least(1, self, "batch_size", "accumulate")
        at_least(0, self, "seed", at_most=2**63 - 1)
        unit, fix = self.accumulate, f"use {nearest_multiples(self.batch_size, self.accumulate)}"
        require(self.batch_size % unit == 0, self, "batch_size", f"a multiple of train.accumulate={unit}; {fix}")


@section("validation.")
class Validation:
    every: int = 50
    """Steps between validations. The last step of each stage is always validated."""
    batches: int = 4
    """Number of held-out batches per validation."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "every", "batches")


@section("checkpoint.")
class Checkpoint:
    every: int = 50
    """Steps between checkpoints. The last step of each stage is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the one that the launch resumed from."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "every", "keep")


@section("log.")
class Log:
    every: int = 10
    """Steps between logged metrics."""
    directory: str = "runs"
    """Parent of the run directory."""
    tensorboard: bool = False
    """Also log to TensorBoard (event files in the run directory)."""
    wandb: bool = False
    """Also log to Weights & Biases, offline unless WANDB_MODE=online."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "every")
        require(bool(self.directory), self, "directory", "a directory, such as 'runs'")


@section()
class Config:
    name: str = "run"
    """Name of the run and of its run directory."""
    resume: Resume = "auto"
    """Resume from the newest checkpoint. auto: if one exists; must: fail if none exists; never: fail if one exists."""
    profile: str | None = None
    """Steps to profile, as START:STOP, both inclusive. Step 1 is the first step of this launch. None: no profile."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    attention: Attention = field(default_factory=Attention)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    stages: tuple[Stage, ...] = (Stage(),)
    """Training stages, in order. Default: one stage with the values of the sections."""

    def __post_init__(self) -> None:
        check_types(self)
        check_directory_name(self, "name")
        if self.profile is not None:
            steps = [int(bound) for bound in self.profile.split(":") if bound.isdecimal()]
            valid = self.profile == ":".join(map(str, steps)) and len(steps) == 2 and 1 <= steps[0] <= steps[1]
            require(valid, self, "profile", "START:STOP, the first and last step to profile, such as '10:12'")
        if self.stages != (Stage(),):
            for number in range(1, len(self.stages) + 1):
                with stage_errors(self.stages, number):
                    self.stage(number)
            lengths = {self.stage(number).data.seq_len for number in range(1, len(self.stages) + 1)}
            for path in self.data.paths:
                if path.startswith(TASK) and path.count(":") == 1 and len(lengths) > 1:
                    rule = "must specify a document length, because the stages differ in seq_len"
                    raise ValueError(f"data.path={path!r} {rule}; use {path}:{min(lengths)}")

    def stage(self, number: int) -> "Config":
        """Returns stage `number` (from 1) as a config with a single stage."""
        return with_values(self, {"stages": (Stage(),)} | self.stages[number - 1].overrides())

    def steps_before(self, number: int) -> int:
        """Returns the number of updates before stage `number`, which may be one past the last stage."""
        return sum(self.stage(earlier).train.steps for earlier in range(1, number))

    def stage_after(self, step: int) -> int:
        """Returns the number of the stage that update `step + 1` belongs to; the last stage if training is complete."""
        ends = [self.steps_before(number + 1) for number in range(1, len(self.stages) + 1)]
        return next((number for number, end in enumerate(ends, 1) if end > step), len(ends))

    @property
    def run_directory(self) -> Path:
        """Run directory, inside log.directory."""
        return Path(self.log.directory) / self.name
