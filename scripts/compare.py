"""Compares two runs: python scripts/compare.py A B [--tolerance X] [--plot FILE] [--json FILE]

A and B are run directories. Compares configs, environments, and metrics step by step. The exit status is 0 if both have
the same steps and all metrics are equal within the tolerance, and 1 if not.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals()

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ringattn import config
from ringattn.runs.comparison import compare, plot, report
from ringattn.runs.files import check_writable, write_json, writing


@dataclass(frozen=True, kw_only=True)
class Options:
    tolerance: float | None = None
    """Maximum relative difference of equal values. 0: equal bit for bit. Default: 1e-5."""
    plot: str | None = None
    """Also plot losses and relative differences to this PNG file."""
    json: str | None = None
    """Also write the comparison to this JSON file."""


def main() -> int:
    options, (first, second) = config.parse_words(Options, ("A", "B"), sys.argv[1:], __doc__ or "")
    with config.reported_errors():
        for name, path in (("--plot", options.plot), ("--json", options.json)):
            if path is not None:
                check_writable(Path(path), name)
        comparison = compare(Path(first), Path(second), 1e-5 if options.tolerance is None else options.tolerance)
        for path, write in ((options.plot, plot), (options.json, lambda c, path: write_json(path, asdict(c)))):
            if path is not None:
                with writing(Path(path)):
                    write(comparison, Path(path))
    print(*report(comparison), sep="\n")
    return int(not comparison.equal)


if __name__ == "__main__":
    sys.exit(main())
