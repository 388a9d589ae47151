"""Saves a model as a run directory, which scripts/eval.py evaluates."""

from pathlib import Path

import jax

from ringattn import config
from ringattn.runs.checkpoint import Checkpoints
from ringattn.runs.files import complete_directory
from ringattn.weights.loaded import Loaded
from ringattn.weights.saving import check_target
from ringattn.weights.source import chat_files

STEP = 1
"""Step of the checkpoint, the first one that a run can have."""


def save_run(loaded: Loaded, path: str | Path) -> None:
    """Writes config.json, the tokenizer, the chat template and a checkpoint without optimizer state to `path`.

    `path` appears once it is complete. The run can be evaluated, and loaded again, but not resumed.

    Raises ValueError, with a fix, if `path` is not empty or cannot be written, or if the model has no tokenizer.json,
    which a run needs.
    """
    directory = check_target(path)
    tokenizer = loaded.tokenizer.documents
    if "tokenizer.json" not in tokenizer.files:
        problem = f"has no tokenizer.json, but the tokenizer {tokenizer.name!r}"
        raise ValueError(f"{loaded.path} {problem}; use it as it is, if it is a run directory")
    size = loaded.config.vocabulary or 0
    if size < tokenizer.size:
        problem = f"has a vocabulary of {size} ids, but its tokenizer.json has {tokenizer.size}"
        raise ValueError(f"{loaded.path} {problem}; remove the ids that the model does not have from tokenizer.json")
    data = config.Data(tokenizer=str(directory / "tokenizer.json"), seq_len=loaded.details.context)
    log, train = config.Log(directory=str(directory.parent)), config.Train(steps=STEP)
    c = config.Config(name=directory.resolve().name, model=loaded.config, data=data, log=log, train=train)
    with complete_directory(directory, "free disk space, or use another directory") as temporary:
        (temporary / "config.json").write_text(config.to_json(c), encoding="utf-8")
        for name, content in (chat_files(loaded.details.files) | tokenizer.files).items():
            (temporary / name).write_bytes(content)
        with jax.set_mesh(loaded.mesh), Checkpoints(temporary / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(STEP, {"params": loaded.params})
            checkpoints.confirm(STEP)
