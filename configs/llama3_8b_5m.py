"""Plans the 8B model on rows of 5,242,880 tokens on the eight GPUs of one host.

    python scripts/plan.py --config configs/llama3_8b_5m.py --topology h100:8

Expect it to fit: the layers' inputs and AdamW's moments are in host memory, and attention runs head by head. Each
row is one sequence, so that cuDNN computes attention.
"""

from dataclasses import replace

from llama3_8b_1m import config as one_million

config = replace(
    one_million,
    name="llama3_8b_5m",
    model=replace(one_million.model, rope_factor=640.0, remat="offload_inputs", head_groups=8),
    data=replace(one_million.data, seq_len=5_242_880, separate_documents=False),
    optimizer=replace(one_million.optimizer, offload=True),
)
