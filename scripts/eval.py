"""Evaluates runs: python scripts/eval.py --config configs/eval_needle.py [--runs DIRECTORY ...] [--option VALUE ...]

Writes results, tables and plots to runs/<run>/evaluations/<name>/. Run the same command again to resume an interrupted
evaluation.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals("run the same command again to resume")

import sys

from ringattn import config, evaluation


def main() -> int:
    settings = config.parse(sys.argv[1:], __doc__ or "", config.Evaluation, evaluation.adopt)
    with config.reported_errors():
        return evaluation.evaluate(settings)


if __name__ == "__main__":
    sys.exit(main())
