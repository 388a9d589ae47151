"""A genome, base by base: rows of 8,192 bases over a ring of 8 simulated devices.

    python scripts/train.py --config configs/dna.py --data.path genome.fa.gz

A FASTA file, plain or gzip, such as that of E. coli K-12 in Debian's package ragout-examples: expect a validation loss
near 1.358 nats a base (knowing nothing costs ln 4 = 1.386), after some two minutes on two free CPU cores. What
is near tells most about a base, so that a window of 256 learns faster than the whole row: one hop instead of seven.
Each row repeats the last 256 bases of the one before, so that every base but the first ones has its whole window.
"""

from ringattn.config import Attention, Checkpoint, Config, Data, Evaluate, Log, Mesh, Model, Optimizer, Train

config = Config(
    name="dna",
    model=Model(layers=3, dim=128, heads=2, kv_heads=2, head_dim=32, feed_forward=384),
    data=Data(path="genome.fa.gz", tokenizer="dna", seq_len=8192, overlap=256),
    mesh=Mesh(data=-1, context=8, simulate=8),
    attention=Attention(layout="contiguous", strategy="ring", window=255),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=30),
    train=Train(steps=240, batch_size=1),
    evaluate=Evaluate(every=120, batches=24),
    checkpoint=Checkpoint(every=120),
    log=Log(every=10),
)
