"""Times attention: python scripts/benchmark.py --config configs/benchmark.py [--field value ...]

Table, results.json and plot go to runs/<name>/. The same command again measures anew and replaces them.
"""

import sys

from ringattn import benchmark, config


def main() -> int:
    run = config.parse(sys.argv[1:], __doc__ or "", config.Benchmark)
    with config.reported_errors():
        return benchmark.benchmark(run)


if __name__ == "__main__":
    sys.exit(main())
