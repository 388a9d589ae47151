"""Silences what Orbax, asyncio and TensorStore print about failures of checkpoints that are also raised."""

import logging
import re
import sys
import warnings

_ABANDONED = re.compile(
    r"Event loop is closed$|coroutine '(Store\..*|_read_array_\w+)' was never awaited|Encountered error while reading"
)


def silence() -> None:
    """Drops these messages for the rest of the process.

    Orbax logs the errors that it raises, with tracebacks. It closes its event loop when the first of many concurrent
    reads or writes fails; each of the others would later print a traceback about the closed loop, that its exception
    was never retrieved, or that it was never awaited.
    """
    hook = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not isinstance(error, Exception) or not _ABANDONED.match(str(error)):
            hook(unraisable)

    def is_reported(record: logging.LogRecord) -> bool:
        is_orbax = "orbax" in record.pathname or "orbax" in record.getMessage()
        return not is_orbax or record.levelno < logging.ERROR

    sys.unraisablehook = report
    warnings.filterwarnings("ignore", _ABANDONED.pattern, RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_reported)
