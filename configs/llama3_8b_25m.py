"""Plans the 8B model on rows of 25,165,824 tokens: only the layers' inputs are saved, in host memory.

    python scripts/plan.py --config configs/llama3_8b_25m.py --topology v5p:4x4x4

Expect it to fit on 64 chips with 95.74 GiB and a host's 104 GiB each.
"""

from dataclasses import replace

from llama3_8b_1m import config as one_million

config = replace(
    one_million,
    name="llama3_8b_25m",
    model=replace(one_million.model, rope_factor=3072.0, remat="offload_inputs"),
    data=replace(one_million.data, seq_len=25_165_824),
)
