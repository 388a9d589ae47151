"""Trains a model: python scripts/train.py --config configs/quickstart.py [--section.field value ...]

Everything a run leaves lies in runs/<name>/. The same command again goes on from the newest checkpoint.
"""

import sys

from ringattn import config, training


def main() -> int:
    run = config.parse(sys.argv[1:], __doc__ or "")
    with config.reported_errors():
        return training.train(run)


if __name__ == "__main__":
    sys.exit(main())
