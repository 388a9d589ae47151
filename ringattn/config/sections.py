"""What a run is: frozen sections that check themselves, each field with its type, default and meaning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ringattn.config.checks import at_least, check_folder_name, check_types, nearest_multiples, require
from ringattn.config.stages import Stage, changed, said_of
from ringattn.config.tasks import TASK, check_task

Layout = Literal["contiguous", "striped", "zigzag"]
Strategy = Literal["ring", "gather", "ulysses", "usp", "auto"]


@dataclass(frozen=True, kw_only=True)
class Model:
    layers: int = 4
    """Number of transformer layers."""
    dim: int = 256
    """Width of the residual stream (E)."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); heads must be a multiple."""
    head_dim: int = 32
    """Width of a head (D), even."""
    feed_forward: int = 768
    """Inner width of the SwiGLU feed-forward (F)."""
    vocabulary: int | None = None
    """Ids in the tables; None: as many as the tokenizer has."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How the turning is slowed for rows longer than a model was trained on."""
    rope_factor: float = 1.0
    """How many times longer the rows become by rope_scaling."""
    rope_original: int = 8192
    """Length of the rows that the model was trained on before, for rope_scaling yarn and llama3."""
    tied: bool = True
    """Whether the output projection is the embedding's transpose."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, softmax and loss are always float32."""
    remat: Literal["off", "on", "offload"] = "off"
    """What a layer keeps for the backward pass: all; its input and attention's result; these in host memory."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "layers", "dim", "heads", "kv_heads", "head_dim", "feed_forward", "rope_original")
        require(self.vocabulary is None or self.vocabulary >= 1, self, "vocabulary", "at least 1, or None")
        multiple = f"a multiple of model.kv_heads={self.kv_heads}: use {nearest_multiples(self.heads, self.kv_heads)}"
        require(self.heads % self.kv_heads == 0, self, "heads", multiple)
        even = f"even, for rotary positions turn pairs: use {nearest_multiples(self.head_dim, 2)}"
        require(self.head_dim % 2 == 0, self, "head_dim", even)
        require(self.rope_theta > 1, self, "rope_theta", "positive, and more than 1, such as 10000")
        scaled = "more than 1 with rope_scaling, such as 4: how many times longer the rows become"
        if self.rope_scaling == "none":
            scaled = "1.0 without rope_scaling: set model.rope_scaling to 'linear', 'ntk', 'yarn' or 'llama3'"
        require((self.rope_factor > 1) == (self.rope_scaling != "none"), self, "rope_factor", scaled)


@dataclass(frozen=True, kw_only=True)
class Data:
    path: str | tuple[str, ...] = "stdlib"
    """What to train on: a file, a folder, a glob, token shards, 'stdlib' (Python's own source), a retrieval task
    ('task:needle', a document a row, or 'task:needle:128', of so many tokens); or several."""
    mixture: tuple[float, ...] | None = None
    """For several paths, how many rows come from each, in proportion (7 3); None: every row of each once an epoch."""
    tokenizer: str = "bytes"
    """'bytes', 'dna', 'video' (learns a codebook), or the path of a tokenizer.json or a codebook.npy."""
    seq_len: int = 2048
    """Tokens in a row (L)."""
    overlap: int = 0
    """Tokens that a document longer than a row repeats in its next row, as context without weight in the loss."""
    frame_size: tuple[int, ...] = (32, 48)
    """Height and width to which frames of video are scaled; multiples of 4, for patches of 4 x 4 are tokens."""
    validation: float = 0.05
    """Share of the documents that is held out for validation; of a single document its end."""

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.paths) == 1:  # so that a path is the same, however it was given
            object.__setattr__(self, "path", self.paths[0])
        require(all(self.paths), self, "path", "a file, a folder, a glob or 'stdlib'")
        for path in self.paths:
            if path.startswith(TASK):
                check_task(path, self.seq_len)
        if self.mixture is not None:
            shares = f"one positive share for each of the {len(self.paths)} of data.path, or None"
            object.__setattr__(self, "mixture", tuple(map(float, self.mixture)))
            require(len(self.mixture) == len(self.paths) and min(self.mixture) > 0, self, "mixture", shares)
        require(bool(self.tokenizer), self, "tokenizer", "'bytes', 'dna', 'video' or the path of a tokenizer.json")
        at_least(1, self, "seq_len")
        at_least(0, self, "overlap")
        require(self.overlap < self.seq_len, self, "overlap", f"less than data.seq_len={self.seq_len}")
        sides = "a height and a width, each a multiple of 4, such as 32 48"
        right = len(self.frame_size) == 2 and all(side > 0 and side % 4 == 0 for side in self.frame_size)
        require(right, self, "frame_size", sides)
        require(0 < self.validation < 1, self, "validation", "between 0 and 1, such as 0.05")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path`, however many there are."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True, kw_only=True)
class Mesh:
    data: int = 1
    """Devices over which the rows of a batch are spread; -1: what the other axes leave."""
    context_outer: int = 1
    """Rings that share each row: a ring of rings, or of exchanges (strategy usp); -1: what the other axes leave."""
    context: int = -1
    """Devices in the ring, over which each row is spread; -1: what the other axes leave."""
    tensor: int = 1
    """Devices over which heads and feed-forward are spread; -1: what the other axes leave."""
    simulate: int = 0
    """Run on this many simulated CPU devices; 0: on the devices there are."""

    def __post_init__(self) -> None:
        check_types(self)
        sizes = {name: size for name, size in vars(self).items() if name != "simulate"}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, self, name, "at least 1, or -1 for what the other axes leave")
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            both = " and ".join(f"mesh.{name}=-1" for name in rest)
            raise ValueError(f"{both}: only one axis can take what the others leave; set --mesh.{rest[0]} 1")
        at_least(0, self, "simulate")


@dataclass(frozen=True, kw_only=True)
class Attention:
    layout: Layout = "zigzag"
    """Order in which a row's tokens lie over the ring; zigzag and striped balance causal work."""
    strategy: Strategy = "ring"
    """How queries meet all keys: K/V go round, or are gathered, or heads exchanged for sequence (usp: exchanged over
    mesh.context, round mesh.context_outer); auto: by cost."""
    window: int | None = None
    """How many tokens back a token sees (None: all of its document)."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.window is None or self.window >= 0, self, "window", "at least 0, or None for no window")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 3e-3
    """Peak of the schedule: linear warm-up, then cosine."""
    warmup_steps: int = 20
    """Steps of linear warm-up; a run of fewer steps ends within it."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this global norm."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.learning_rate > 0, self, "learning_rate", "positive, such as 0.003")
        at_least(0, self, "warmup_steps", "weight_decay")
        require(0 <= self.final_fraction <= 1, self, "final_fraction", "between 0 and 1, such as 0.1")
        for name, decay in {"beta1": self.beta1, "beta2": self.beta2}.items():
            require(0 <= decay < 1, self, name, "at least 0 and less than 1, such as 0.9")
        require(self.clip_norm > 0, self, "clip_norm", "positive, such as 1.0")


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 200
    """Optimizer updates."""
    batch_size: int = 4
    """Rows per update, over all devices."""
    accumulate: int = 1
    """Parts a batch is computed in, one after another; batch_size must be a multiple."""
    seed: int = 0
    """Seed of initialisation and of the order of documents."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "steps", "batch_size", "accumulate")
        at_least(0, self, "seed")
        multiple = f"a multiple of train.accumulate={self.accumulate}: use "
        multiple += nearest_multiples(self.batch_size, self.accumulate)
        require(self.batch_size % self.accumulate == 0, self, "batch_size", multiple)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    every: int = 50
    """Steps between validations; one more comes after the last step."""
    batches: int = 4
    """Batches of held-out rows per validation."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "every", "batches")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = 50
    """Steps between checkpoints; one more is written after the last step."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class Log:
    every: int = 10
    """Steps between rows of metrics.jsonl."""
    directory: str = "runs"
    """Folder that holds the run's own folder."""
    tensorboard: bool = False
    """Whether TensorBoard may watch, too: event files in the run's folder."""
    wandb: bool = False
    """Whether Weights & Biases may watch, too: offline in the run's folder, unless WANDB_MODE=online."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "every")
        require(bool(self.directory), self, "directory", "a folder, such as 'runs'")


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "run"
    """Name of the run: its folder inside log.directory."""
    resume: Literal["never", "auto", "must"] = "auto"
    """Whether a run whose folder holds a checkpoint goes on from it."""
    profile: str | None = None
    """Steps of this start, START:STOP counted from 1, of which a trace is made (None: of none)."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    attention: Attention = field(default_factory=Attention)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    stages: tuple[Stage, ...] = (Stage(),)
    """Parts of the training, one after another, each with its own steps; by default one, as the sections say."""

    def __post_init__(self) -> None:
        check_types(self)
        check_folder_name(self, "name")
        if self.profile is not None:
            steps = [int(number) for number in self.profile.split(":") if number.isdecimal()]
            whole = self.profile == ":".join(map(str, steps)) and len(steps) == 2 and 1 <= steps[0] <= steps[1]
            require(whole, self, "profile", "START:STOP, the first and the last step to trace, such as '10:12'")
        if self.stages != (Stage(),):
            for number in range(1, len(self.stages) + 1):
                with said_of(self.stages, number):
                    self.stage(number)
            lengths = {self.stage(number).data.seq_len for number in range(1, len(self.stages) + 1)}
            for path in self.data.paths:
                if path.startswith(TASK) and path.count(":") == 1 and len(lengths) > 1:
                    cure = f"say how long its documents are, as in {path}:{min(lengths)}"
                    raise ValueError(f"data.path={path!r} with rows of several lengths: {cure}")

    def stage(self, number: int) -> "Config":
        """Stage `number`, counted from 1, as a config of its own, which has this stage alone."""
        return changed(self, {"stages": (Stage(),)} | self.stages[number - 1].own())

    def steps_before(self, number: int) -> int:
        """Updates that come before stage `number`; those of the whole run, if `number` is one past the last."""
        return sum(self.stage(each).train.steps for each in range(1, number))

    def stage_after(self, step: int) -> int:
        """The stage of the update that follows the first `step` of all; the last stage, if there is none left."""
        ends = [self.steps_before(number + 1) for number in range(1, len(self.stages) + 1)]
        return next((number for number, end in enumerate(ends, 1) if end > step), len(ends))

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return Path(self.log.directory) / self.name
