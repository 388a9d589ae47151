"""Genome model with one token per base, on rows of 8,192 bases and a ring of 8 simulated devices.

    python scripts/train.py --config configs/dna.py --data.path genome.fa.gz

Takes a FASTA file, plain or gzipped, such as E. coli K-12 in the Debian package ragout-examples. Expect about two
minutes on two idle CPU cores and a validation loss near 1.358 nats per base (a uniform guess scores ln 4 = 1.386).
Nearby bases are the best predictors, so a model with a window of 255 preceding bases learns faster than with full
attention, and needs one hop instead of seven. Each row repeats the last 256 bases of the preceding row, so that every
later base has its full window.
"""

from ringattn.config import Attention, Checkpoint, Config, Data, Log, Mesh, Model, Optimizer, Train, Validation

config = Config(
    name="dna",
    model=Model(layers=3, dim=128, heads=2, kv_heads=2, head_dim=32, feed_forward=384, window=255),
    data=Data(path="genome.fa.gz", tokenizer="dna", seq_len=8192, overlap=256),
    mesh=Mesh(data=-1, context=8, simulate=8),
    attention=Attention(layout="contiguous", strategy="ring"),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=30),
    train=Train(steps=240, batch_size=1),
    validation=Validation(every=120, batches=24),
    checkpoint=Checkpoint(every=120),
    log=Log(every=10),
)
