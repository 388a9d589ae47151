"""Evaluates runs: python scripts/eval.py --config configs/eval_needle.py [--runs runs/one runs/two] [--field value ...]

Results, tables and plots go to runs/<run>/evaluations/<name>/. A stopped evaluation goes on where it was.
"""

import sys

from ringattn import config, evaluation


def main() -> int:
    asked = config.parse(sys.argv[1:], __doc__ or "", config.Evaluation)
    with config.reported_errors():
        return evaluation.evaluate(asked)


if __name__ == "__main__":
    sys.exit(main())
