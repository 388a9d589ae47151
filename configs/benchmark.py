"""Compares ring attention, dense attention and the PyPI package ringattention at three row lengths.

    python scripts/benchmark.py --config configs/benchmark.py

The package is included if it is installed: pip install -e '.[benchmark]'. Prints one table per length. Dense attention
stores one logit per pair of tokens; lengths at which it does not fit in memory are skipped. Simulated devices share the
CPU, so the times measure total work and do not show the benefit of a balanced layout.
"""

from ringattn.config import Benchmark

config = Benchmark(
    name="benchmark",
    simulate=8,
    rings=(8,),
    shard_tokens=(512, 1024, 2048),
    subjects=(
        "ring zigzag",
        "ring contiguous",
        "dense",
        "ringattention",
    ),
    baselines=("ringattention", "dense"),
    seconds=60,
)
