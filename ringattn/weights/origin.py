"""The checkpoint that training starts from: `model.weights` sets the model section and the tokenizer of a config."""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ringattn import config
from ringattn.data import Tokenizer, find_tokenizer
from ringattn.data.chat import ChatTemplate
from ringattn.data.file_tokenizer import FileTokenizer
from ringattn.model.parallel import Params
from ringattn.runs.checkpoint import saved_steps
from ringattn.runs.directory import SavedCheckpoint, find_checkpoint
from ringattn.runs.files import expanded
from ringattn.runs.reading import params_digest, read_params
from ringattn.weights.chat_template import TOKENIZER, added_tokens, named_object, read_chat_template
from ringattn.weights.loading import Advance, is_run, open_source, read_source
from ringattn.weights.source import Source, chat_files, read_files

ROPE = ("rope_theta", "rope_local_theta", "rope_scaling", "rope_factor", "rope_original")
"""Fields that may differ from the checkpoint, to extend its context."""
FREE = ("weights", "dtype", "remat", "head_groups")
"""Fields that do not describe the checkpoint."""
_DEFAULTS = {field.name: field.default for field in fields(config.Model)}
assert MISSING not in _DEFAULTS.values()


@dataclass(frozen=True)
class Origin:
    """A checkpoint whose parameters have not been read."""

    path: Path
    model: config.Model
    """The vocabulary is set."""
    context: int
    """Number of tokens that the model was trained for."""
    tokenizer_name: str | None
    """Value of data.tokenizer; None without a tokenizer."""
    source: Source | SavedCheckpoint

    def tokenizer(self, data: config.Data) -> Tokenizer:
        """Returns the tokenizer; without one, that of `data`. Raises ValueError if it does not fit the model."""
        if isinstance(self.source, SavedCheckpoint):
            return find_tokenizer(self.source.stage()[0].data, run_directory=self.source.directory)
        vocabulary = self.model.vocabulary or 0
        if self.tokenizer_name is None:
            tokenizer = find_tokenizer(data)
        else:
            content = _without_surplus(self.source.details.files, vocabulary, self.path)
            tokenizer = FileTokenizer(self.tokenizer_name, content)
        if tokenizer.size > vocabulary:
            problem = f"the tokenizer has {tokenizer.size} tokens, but the model of {self.path} has {vocabulary}"
            raise ValueError(f"{problem}; use the tokenizer that belongs to the model")
        return tokenizer

    @property
    def no_tokenizer(self) -> str:
        """Reason why `tokenizer_name` is None."""
        return "" if isinstance(self.source, SavedCheckpoint) else self.source.details.no_tokenizer

    def begin_id(self) -> int | None:
        """Returns the begin-of-text token that a checkpoint names; None if it names none, and for runs."""
        if isinstance(self.source, SavedCheckpoint):
            return None
        return self.source.details.token_ids.get("bos_token_id")

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template; None if there is none. Raises ValueError if a file is damaged."""
        path = self.source.directory if isinstance(self.source, SavedCheckpoint) else self.path
        return read_chat_template(self._files, path)

    @property
    def chat_files(self) -> dict[str, bytes]:
        """Contents of the chat template and of the settings of the tokenizer by name, which a run stores."""
        return chat_files(self._files) if "tokenizer.json" in self._files else {}

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """Contents of the files of the tokenizer, by name."""
        if isinstance(self.source, SavedCheckpoint):
            return read_files(self.source.directory)
        return self.source.details.files

    def digest(self) -> str:
        """Returns a hexadecimal digest of the parameters, from all bytes of the files. Raises ValueError."""
        if isinstance(self.source, SavedCheckpoint):
            return params_digest(self.source.directory / "checkpoints", self.source.step)
        return self.source.digest()

    def check(self, model: config.Model) -> None:
        """Raises ValueError if `model` is not the section that `adopt` returns."""
        for name in _DEFAULTS:
            mine, theirs = vars(model)[name], vars(self.model)[name]
            if mine != theirs and name not in FREE + ROPE:
                problem = f"model.{name}={mine!r}, but model.weights={str(self.path)!r} has {theirs!r}"
                raise ValueError(f"{problem}; pass adopt(config), of ringattn.weights or ringattn.evaluation")

    def read(self, like: Params, advance: Advance = lambda done, total: None) -> Params:
        """Returns the parameters, placed like `like`: jax.ShapeDtypeStructs with shardings."""
        if isinstance(self.source, SavedCheckpoint):
            return read_params(self.source.directory / "checkpoints", self.source.step, like)
        return read_source(self.source, like, advance)


def find_origin(path: str) -> Origin:
    """Opens the Hugging Face directory, GGUF file or run directory at `path`. Raises ValueError: see `load`."""
    given = expanded(path)
    if is_run(given):
        return run_origin(path, "model.weights")
    source = open_source(given)
    name = str(given / "tokenizer.json" if given.is_dir() else given)
    has_tokenizer = "tokenizer.json" in source.details.files
    model, context = source.model, source.details.context
    return Origin(given, _extensible(model, context), context, name if has_tokenizer else None, source)


def run_origin(path: str, option: str) -> Origin:
    """Opens the checkpoint at `path`, or the newest one of the run directory `path`; `option` is used in messages."""
    checkpoint = find_checkpoint(path, option)
    stage, trained_length = checkpoint.stage()
    tokenizer = find_tokenizer(stage.data, run_directory=checkpoint.directory)
    model = replace(stage.model, vocabulary=stage.model.vocabulary or tokenizer.size, weights=None)
    return Origin(Path(path), _extensible(model, trained_length), trained_length, stage.data.tokenizer, checkpoint)


def _extensible(model: config.Model, context: int) -> config.Model:
    """Returns `model` with the length that it was trained for, which YaRN needs to extend it."""
    return replace(model, rope_original=context) if model.rope_scaling == "none" else model


def adopt(c: config.Config, explicit: Collection[str] = ()) -> config.Config:
    """Returns `c` with the model section and the tokenizer of the checkpoint `model.weights`, if it names one.

    A run that has a checkpoint of its own adopts its earlier config, and does not need `model.weights` again.

    Args:
      c: a config. Values that differ from the defaults of `config.Model` must agree with the checkpoint, except for
        dtype, remat, head_groups and the RoPE fields, which extend the context.
      explicit: names of options given on the command line, such as 'model.layers'. They must agree with the
        checkpoint even if they have the default value.

    Raises ValueError if the checkpoint cannot be opened, or if `c` contradicts it.
    """
    if c.model.weights is None:
        return c
    previous = _previous(c)
    if previous is None:
        origin = find_origin(c.model.weights)
        model, tokenizer, problem = origin.model, origin.tokenizer_name, origin.no_tokenizer
    else:
        model, tokenizer, problem = previous.model, previous.data.tokenizer, ""
    return replace(
        c,
        model=merged(c.model, model, explicit, c.model.weights),
        data=replace(c.data, tokenizer=_tokenizer(c, tokenizer, explicit, problem)),
    )


def merged(given: config.Model, found: config.Model, explicit: Collection[str], path: str) -> config.Model:
    """Returns `found` with the fields of `given` that may differ. Raises ValueError if another field contradicts it."""
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, default in _DEFAULTS.items():
        mine, is_given = vars(given)[name], vars(given)[name] != default or f"model.{name}" in explicit
        if name in FREE or (name in ROPE and is_given):
            values[name] = mine
        elif is_given and mine != vars(found)[name]:
            wrong.append(name)
    if wrong:
        mine, theirs = ([vars(model)[name] for name in wrong] for model in (given, found))
        problem = ", ".join(f"model.{name}={value!r}" for name, value in zip(wrong, mine, strict=True))
        flags = " ".join(f"--model.{name} {config.as_option(value)}" for name, value in zip(wrong, theirs, strict=True))
        fix = f"use {flags}, or leave out what the checkpoint sets"
        raise ValueError(f"{problem}, but model.weights={path!r} has {', '.join(map(repr, theirs))}; {fix}")
    changed = values.get("rope_scaling", found.rope_scaling) != found.rope_scaling != "none"
    if changed and "rope_original" not in values:
        rule = f"needs model.rope_original, because model.weights={path!r} has rope_scaling={found.rope_scaling!r}"
        fix = "set it to the number of tokens that the checkpoint was trained for"
        raise ValueError(f"model.rope_scaling={given.rope_scaling!r} {rule}; {fix}")
    return replace(found, **values)


def _without_surplus(files: Mapping[str, bytes], vocabulary: int, path: Path) -> bytes:
    """Returns the tokenizer.json without special tokens beyond the model's vocabulary, such as Gemma 3's for images.

    Raises ValueError if it is damaged.
    """
    values = named_object(files, TOKENIZER, path)
    added_tokens(values, path)
    added = values.get("added_tokens") or []
    kept = [token for token in added if token["id"] < vocabulary or not token["special"]]
    same = len(kept) == len(added)
    return files[TOKENIZER] if same else json.dumps(values | {"added_tokens": kept}).encode()


def _previous(c: config.Config) -> config.Config | None:
    """Returns the config of the run that `c` resumes, if it started from the same weights."""
    file = c.run_directory / "config.json"
    if not saved_steps(c.run_directory / "checkpoints") or not file.is_file():
        return None
    previous = config.load(file)
    return previous if previous.model.weights == c.model.weights else None


def _tokenizer(c: config.Config, found: str | None, explicit: Collection[str], problem: str) -> str:
    """Returns the value of data.tokenizer. Raises ValueError if `c` names another tokenizer than the checkpoint's."""
    given, path = c.data.tokenizer, c.model.weights
    is_given = given != config.Data().tokenizer or "data.tokenizer" in explicit
    if found is None:
        if is_given:
            return given
        raise ValueError(f"{problem}; or use --data.tokenizer with the path of its tokenizer.json")
    if is_given and given != found:
        fix = f"use --data.tokenizer {found}, or leave it out"
        raise ValueError(f"data.tokenizer={given!r}, but model.weights={path!r} has the tokenizer {found!r}; {fix}")
    return found
