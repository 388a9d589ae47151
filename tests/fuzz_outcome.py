"""The outcome of a case of `fuzz.py`: accepted, refused in one line, or a finding."""

import contextlib
import io
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "ringattn", ROOT / "scripts")
MAX_MESSAGE = 4000
"""Maximum number of characters of a message: longer ones hide what they say."""


class ReachedError(BaseException):
    """Ends a case where the computation would begin. No code of the project catches it."""


class WrongError(AssertionError):
    """A changed file that was accepted, although a size, name or checksum tells that it has changed."""


class Outcome(NamedTuple):
    status: str
    """accepted, refused or finding."""
    message: str = ""


def judge(call: Callable[[], object]) -> Outcome:
    """Calls `call`, and returns how it ended. Its output is dropped."""
    errors = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                call()
            except ValueError as error:
                check_origin(error)
                raise
    except ReachedError:
        return Outcome("accepted")
    except SystemExit as end:
        if end.code in (None, 0, 1):
            return Outcome("accepted")
        lines = errors.getvalue().splitlines()
        if end.code == 2 and lines and lines[-1].startswith("error: "):
            printed = errors.getvalue()[errors.getvalue().index("error: ") :].removesuffix("\n")
            return (
                _refused(printed) if printed.isprintable() else Outcome("finding", f"not printable: {printed!r:.1000}")
            )
        return Outcome("finding", f"exit with status {end.code}: {' / '.join(lines[-3:])}")
    except ValueError as error:
        return _refused(str(error))
    except BaseException as error:  # a finding, whatever it is
        return Outcome("finding", f"{error}\n{_trace(error)}")
    finally:
        logging.disable(logging.NOTSET)
    return Outcome("accepted")


def _trace(error: BaseException) -> str:
    """Returns the last frames of an error and of its cause."""
    shown = [error.__cause__, error] if error.__cause__ else [error]
    return "\n".join("".join(traceback.format_exception(each, chain=False)[-5:]) for each in shown)[-5000:]


def check_origin(error: ValueError) -> None:
    """Raises WrongError unless the project raised `error`: a message of a library names neither field nor file."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not any(Path(last.filename).is_relative_to(directory) for directory in PROJECT):
        raise WrongError(f"not an error of the project: {type(error).__name__}") from error


def _refused(message: str) -> Outcome:
    if len(message.splitlines()) != 1:
        return Outcome("finding", f"the message has {len(message.splitlines())} lines: {message[:1000]!r}")
    if len(message) > MAX_MESSAGE:
        return Outcome("finding", f"the message has {len(message)} characters: {message[:200]!r}")
    return Outcome("refused", message)
