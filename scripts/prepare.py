"""Writes token shards: python scripts/prepare.py --config configs/dna.py --data.path genome.fa.gz --output shards/dna

Training with --data.path shards/dna then verifies and memory-maps the shards instead of reading and tokenizing the
text again. --data.seq_len, --data.overlap and --data.mixture do not affect the shards.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals("run the same command again to start over")

import sys
from dataclasses import dataclass

from ringattn import config
from ringattn.data import prepare

SECTIONS = ("data",)
"""Config sections that affect the shards."""


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    output: str | None = None
    """Directory to create for the shards. If it exists, its shards are verified. Required."""


def main() -> None:
    options, run = config.parse_with(Options, sys.argv[1:], __doc__ or "", sections=SECTIONS)
    with config.reported_errors():
        if options.output is None:
            raise ValueError("--output is required, such as --output shards")
        prepare(run.data, options.output)


if __name__ == "__main__":
    main()
