"""Silences what Orbax, asyncio and TensorStore print about failures of checkpoints that are also raised."""

import logging
import sys


def silence() -> None:
    """Drops these messages for the rest of the process.

    Orbax logs the errors that it raises, with tracebacks. It closes its event loop when the first of many concurrent
    reads or writes fails; each of the others would later print a traceback about the closed loop, or that its
    exception was never retrieved.
    """
    hook = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
            hook(unraisable)

    def is_unknown(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "exception was never retrieved" not in message or "orbax" not in message

    sys.unraisablehook = report
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(is_unknown)
