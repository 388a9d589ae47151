"""Writes token shards: python scripts/prepare.py --config configs/dna.py --data.path genome.fa.gz --output FOLDER

--output names the folder to write, which must not be there yet. Then --data.path FOLDER trains from it, without reading
and tokenising anew; the shards are checked, and mapped into memory.
"""

import argparse
import signal
import sys

from ringattn import config
from ringattn.data import prepare


def main() -> None:
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    words.add_argument("--output", nargs="?")
    found, rest = words.parse_known_args(sys.argv[1:])
    run = config.parse(rest, __doc__ or "")
    with config.reported_errors():
        if not found.output:
            raise ValueError("no folder to write to: name one that is not there yet, such as --output shards")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: nothing is left half done
        prepare(run.data, found.output)


if __name__ == "__main__":
    main()
