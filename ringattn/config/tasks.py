"""What a model can be asked, by name: losses on text, and retrieval, of which `ringattn.data.tasks` says what it is."""

from ringattn.config.checks import unknown

LOSSES = ("loss_by_position", "loss_by_context", "loss_by_kind")
"""By position in a row; of the same tokens by the length of what comes before; by kind of document."""
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
)
TASK = "task:"
"""What a data.path begins with that is no file, but a retrieval task."""


def check_task(path: str, seq_len: int) -> None:
    """Raises ValueError unless `path` is 'task:NAME' or 'task:NAME:LENGTH', and documents of that length fill rows."""
    _, task, *length = path.split(":")
    if task not in RETRIEVAL:
        raise ValueError(f"data.path: {unknown(TASK + task, [TASK + each for each in RETRIEVAL])}")
    if length and not (len(length) == 1 and length[0].isdecimal() and int(length[0]) and seq_len % int(length[0]) == 0):
        cure = f"use a length that divides data.seq_len={seq_len}, such as {TASK}{task}:{seq_len // 2}"
        raise ValueError(f"data.path={path!r} must be {TASK}{task} or {TASK}{task}:LENGTH: {cure}")
