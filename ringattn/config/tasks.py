"""Names of the evaluation tasks: losses on text, and the retrieval tasks of `ringattn.data.tasks`."""

from ringattn.config.checks import option, unknown

LOSSES = ("loss_by_position", "loss_by_context", "loss_by_kind")
"""Loss by position in the row, by context length for the same tokens, and by kind of document."""
RETRIEVAL = (
    "passkey",
    "needle",
    "multi_key",
    "multi_value",
    "multi_query",
    "variables",
    "common_words",
    "frequent_words",
    "lines",
    "where_person",
    "where_thing",
    "mrcr",
)
GENERATED = ("mrcr",)
"""Retrieval tasks that are scored on generated answers only: their score is not exact match."""
TASK = "task:"
"""Prefix of a data.path that names a retrieval task instead of a file."""


def check_task(path: str, seq_len: int) -> None:
    """Raises ValueError unless `path` is 'task:NAME', or 'task:NAME:LENGTH' with a LENGTH that divides seq_len."""
    _, task, *length = path.split(":")
    if task not in RETRIEVAL:
        raise ValueError(f"data.path: {unknown(TASK + task, [TASK + name for name in RETRIEVAL])}")
    if length and not (len(length) == 1 and length[0].isdecimal() and int(length[0]) and seq_len % int(length[0]) == 0):
        example = f"{TASK}{task}:{seq_len // 2}"
        fix = f"use a length that divides {option('data.seq_len')}={seq_len}, such as {example}"
        raise ValueError(f"data.path={path!r} must be {TASK}{task} or {TASK}{task}:LENGTH; {fix}")
