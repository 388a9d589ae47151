"""Numbers in words."""


def bytes_in_words(count: float | int) -> str:
    """1536 -> '1.5 KiB'; to four digits."""
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.4g} {unit}"
    return f"{count:,.4g} bytes"
