"""The ring beside dense attention and the PyPI package ringattention, at three row lengths.

    python scripts/benchmark.py --config configs/benchmark.py

The package is compared with if it is there: pip install -e '.[benchmark]'. Expect a table a length. Dense attention
holds a number for every pair of tokens and is soon slow; at the longest row it may not fit, and is then left out.
Simulated devices share the processor: what is compared here is work done, not what a balanced layout gains.
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
