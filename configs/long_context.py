"""Rows of 32,768 bytes over a ring of 8 simulated devices: sixteen times the quickstart's context.

    python scripts/train.py --config configs/long_context.py

Expect many minutes on two CPU cores, for attention's work grows with the square of the row. remat: of each layer
only its input and attention's result are kept for the backward pass. rope_theta is raised, so that positions thousands
of bytes apart still turn a head's slow pairs by different angles.
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
