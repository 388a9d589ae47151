"""A model to evaluate on any mesh, layout and strategy: the checkpoint of a run, or `model.weights`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ringattn import config
from ringattn.data import Tokenizer
from ringattn.evaluation.batches import ScoreFn
from ringattn.evaluation.generated import GenerateFn, answer_tokens
from ringattn.generation import Generator
from ringattn.generation.prompts import Texts
from ringattn.layout import check_length
from ringattn.mesh.axes import DATA, abstract, context_shards
from ringattn.mesh.devices import check_divisible
from ringattn.model.build import model_factory
from ringattn.model.parallel import Params
from ringattn.model.scoring import make_scorer
from ringattn.runs.directory import SavedCheckpoint
from ringattn.weights.loading import run_details
from ringattn.weights.origin import Origin, find_origin, merged, run_origin


@dataclass(frozen=True)
class LoadedModel:
    """A subject whose parameters are on the devices."""

    score: ScoreFn
    generate: GenerateFn


@dataclass(frozen=True)
class Subject:
    """A checkpoint. Nothing is placed on devices before `load`."""

    name: str
    """The name of the run, directory or file; 'name@step' if a step of a run was specified."""
    directory: Path
    """The run directory, or runs/<name>."""
    origin: Origin
    stage: config.Config
    """Config of the checkpoint's stage, with the evaluation's mesh, layout and strategy."""

    @property
    def step(self) -> int | None:
        """Number of updates of the run; None for other checkpoints."""
        return self.origin.source.step if isinstance(self.origin.source, SavedCheckpoint) else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.origin.tokenizer(self.stage.data)

    @cached_property
    def weights(self) -> str:
        """Digest of the parameters."""
        return self.origin.digest()

    def check(self, c: config.Evaluation, mesh: jax.sharding.Mesh) -> None:
        """Raises ValueError if lengths, batch size or model do not fit the mesh, or if a length is too long."""
        for length in c.lengths:
            check_length(length, c.layout, context_shards(mesh), "lengths", "mesh.context_outer * mesh.context")
            trained_length = self.origin.context
            if length > trained_length and not c.longer:
                trained = f"{self.name} was trained on rows of at most {trained_length} tokens"
                fix = f"use at most {trained_length}, or --longer True to allow longer rows"
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

    def load(self, c: config.Evaluation, mesh: jax.sharding.Mesh) -> LoadedModel:
        """Reads the parameters onto `mesh`. Call it under `jax.set_mesh(mesh)`. Raises ValueError on failure."""
        make_model = model_factory(self.stage, self.tokenizer.size)
        like = abstract(jax.eval_shape(jax.jit(lambda: nnx.split(make_model())[1])), mesh)
        scorer = make_scorer(make_model, self.tokenizer.size, mesh, self.stage.attention.layout)
        params = self.origin.read(like)

        @cache
        def generator() -> Generator:
            return self._generator(params, c, mesh)

        def generate(prompts: list[np.ndarray], max_tokens: int, stop: Sequence[str]) -> list[str]:
            return [result.text for result in generator().generate(prompts, max_tokens=max_tokens, stop=stop)]

        return LoadedModel(partial(scorer, params), generate)

    def _generator(self, params: Params, c: config.Evaluation, mesh: jax.sharding.Mesh) -> Generator:
        """Returns the generator of the answers, which computes and caches in the compute dtype of the model."""
        tokenizer, source, dtype = self.tokenizer, self.origin.source, self.stage.model.dtype
        model = replace(self.stage.model, vocabulary=tokenizer.size)  # as for scoring
        is_run = isinstance(source, SavedCheckpoint)
        if isinstance(source, SavedCheckpoint):
            details = run_details(source.directory, tokenizer, self.origin.context)
        else:
            details = source.details
        texts = Texts.of_tokenizer(tokenizer, tokenizer.size, details.end_ids(), is_run)
        tokens = max(c.lengths) + max(answer_tokens(task, tokenizer) for task in c.tasks if task in config.RETRIEVAL)
        return Generator.of(model, params, mesh, texts, cache_tokens=tokens, cache_dtype=dtype, dtype=dtype)


def adopt(c: config.Evaluation, explicit: Collection[str] = ()) -> config.Evaluation:
    """Returns `c` with the model section of `model.weights`, if set, evaluated instead of the default runs.

    `explicit` are the names of the options given on the command line. Raises ValueError: see `weights.adopt`.
    """
    path = c.model.weights
    if path is None:
        return c
    model = merged(c.model, find_origin(path).model, explicit, path)
    default = config.Evaluation().runs
    return replace(c, model=model, runs=None if c.runs == default and "runs" not in explicit else c.runs)


def find_subjects(c: config.Evaluation) -> list[Subject]:
    """Returns the checkpoints to evaluate. Raises ValueError if one does not exist, or if names are not distinct."""
    subjects = [_run(run_origin(path, "runs"), c) for path in c.runs or ()]
    if c.model.weights is not None:
        subjects.append(_weights(c))
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ValueError(f"runs={c.runs}: the runs must have different names; evaluate them one at a time")
    return subjects


def _run(origin: Origin, c: config.Evaluation) -> Subject:
    """Returns the checkpoint of a run."""
    assert isinstance(origin.source, SavedCheckpoint)
    directory, stage = origin.source.directory, origin.source.stage()[0]
    attention = replace(stage.attention, layout=c.layout, strategy=c.strategy, kernel="auto")
    name = directory.resolve().name + f"@{origin.source.step}" * origin.source.is_explicit
    return Subject(name, directory, origin, replace(stage, mesh=c.mesh, attention=attention, model=_model(stage.model)))


def _weights(c: config.Evaluation) -> Subject:
    """Returns the checkpoint `model.weights`."""
    assert c.model.weights is not None
    origin = find_origin(c.model.weights)
    origin.check(c.model)
    if isinstance(origin.source, SavedCheckpoint):
        run = _run(origin, c)
        return replace(run, stage=replace(run.stage, model=_model(replace(c.model, weights=None))))
    if origin.tokenizer_name is None:
        raise ValueError(origin.no_tokenizer)
    path = origin.path.resolve()
    name = path.stem if path.is_file() else path.name
    data = config.Data(tokenizer=origin.tokenizer_name)
    attention = config.Attention(layout=c.layout, strategy=c.strategy)
    stage = config.Config(name=name, model=_model(c.model), data=data, mesh=c.mesh, attention=attention)
    return Subject(name, Path("runs") / name, origin, stage)


def _model(c: config.Model) -> config.Model:
    """Returns `c` for a forward pass alone, which needs no choice of `remat`: 'on' computes it in chunks."""
    return replace(c, remat="on") if c.remat == "auto" else c
