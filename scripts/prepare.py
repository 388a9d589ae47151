"""Writes token shards: python scripts/prepare.py --config configs/dna.py --data.path genome.fa.gz --output shards/dna

Training with --data.path shards/dna then memory-maps the shards, after verifying them, instead of reading and
tokenizing the text again. --data.seq_len, --data.overlap and --data.mixture do not affect the shards.
"""

import signal
import sys
from dataclasses import dataclass

from ringattn import config
from ringattn.data import prepare

SECTIONS = ("data",)
"""Config sections that affect the shards."""


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    output: str | None = None
    """New directory for the shards; if it exists, its shards are verified. Required."""


def main() -> None:
    options, run = config.parse_with(Options, sys.argv[1:], __doc__ or "", sections=SECTIONS)
    with config.reported_errors():
        if options.output is None:
            raise ValueError("--output is required, such as --output shards")
        # Without this handler SIGTERM would not unwind the stack, and the temporary directory would remain.
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
        prepare(run.data, options.output)


if __name__ == "__main__":
    main()
