"""Benchmarks attention: python scripts/benchmark.py --config configs/benchmark.py [--option VALUE ...]

Writes a table, results.json and a plot to runs/<name>/. Running the same command again replaces them. With --topology,
counts cycles with the TPU compiler, without a TPU.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals("run the same command again to start over")

import sys

from ringattn import benchmark, config


def main() -> int:
    settings = config.parse(sys.argv[1:], __doc__ or "", config.Benchmark)
    with config.reported_errors():
        return benchmark.benchmark(settings)


if __name__ == "__main__":
    sys.exit(main())
