"""Rows of 32,768 bytes on a ring of 8 simulated devices: 16 times the context of the quickstart.

    python scripts/train.py --config configs/long_context.py

Slow on CPU, because attention work grows with the square of the row length. With remat each layer saves only its input
and its attention output for the backward pass. The larger rope_theta lets low-frequency RoPE dimensions distinguish
positions thousands of bytes apart.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="long_context",
    model=replace(quickstart.model, rope_theta=100_000.0, remat="on"),
    data=replace(quickstart.data, seq_len=32_768, validation=0.1),
    train=replace(quickstart.train, steps=50, batch_size=1),
)
