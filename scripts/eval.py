"""Evaluates runs: python scripts/eval.py --config configs/eval_needle.py [--runs DIRECTORY ...] [--option VALUE ...]

Writes results, tables and plots to runs/<run>/evaluations/<name>/. Run the same command again to resume an interrupted
evaluation.
"""

import sys

from ringattn import config, evaluation


def main() -> int:
    settings = config.parse(sys.argv[1:], __doc__ or "", config.Evaluation)
    with config.reported_errors():
        return evaluation.evaluate(settings)


if __name__ == "__main__":
    sys.exit(main())
