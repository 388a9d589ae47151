"""Formats byte counts, durations and errors as short text."""


def bytes_in_words(count: float | int) -> str:
    """Formats a byte count with four significant digits: 1536 -> '1.5 KiB'."""
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.4g} {unit}"
    return f"{count:,.4g} bytes"


def duration_in_words(seconds: float) -> str:
    """Formats a duration in at most two units, from seconds to days: 75 -> '1 min 15 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 200 characters; its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
