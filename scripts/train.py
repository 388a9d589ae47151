"""Trains a model: python scripts/train.py --config configs/quickstart.py [--section.field VALUE ...]

Writes metrics, checkpoints and plots to the run directory, runs/<name>/. Run the same command again to resume from the
newest checkpoint.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals("run the same command again to resume")

import sys

from ringattn import config, planning, training, weights
from ringattn.runs import local


def main() -> int:
    options, run = config.parse_with(local.Options, sys.argv[1:], __doc__ or "", adopt=weights.adopt)
    with config.reported_errors():
        run = local.simulated(run, options)
        if options.launches:
            return local.launch(run, options, [sys.executable, *sys.argv])
        local.end_with_launcher()
        return training.train(run, planning.choose)


if __name__ == "__main__":
    sys.exit(main())
