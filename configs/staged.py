"""Progressive context extension: rows of 1,024, 2,048 and 4,096 bytes on rings of 2, 4 and 8 simulated devices.

    python scripts/train.py --config configs/staged.py

A small version of the recipe of Large World Models (arXiv 2402.08268). Each stage starts from the weights of the
previous stage, doubles the row length, raises rope_theta and halves the batch size, so that the number of tokens per
update stays constant. The batch is sharded over the devices that the ring does not use. Expect about three minutes on
two CPU cores and a validation loss near 2.3 nats per byte.
"""

from dataclasses import replace

from quickstart import config as quickstart

from ringattn.config import Stage

config = replace(
    quickstart,
    name="staged",
    stages=(
        Stage(steps=200, seq_len=1024, batch_size=4, data=4, context=2),
        Stage(steps=100, seq_len=2048, batch_size=2, data=2, context=4, rope_theta=30_000.0, learning_rate=1e-3),
        Stage(steps=100, seq_len=4096, batch_size=1, data=1, context=8, rope_theta=100_000.0, learning_rate=1e-3),
    ),
)
