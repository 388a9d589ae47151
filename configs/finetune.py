"""Continues the training of a checkpoint: a Hugging Face directory, a GGUF file or a run.

    python scripts/train.py --config configs/finetune.py

This continues the quickstart, which must be trained first, in rows twice as long. Choose another checkpoint and text
with --model.weights, --data.path and --data.seq_len. The checkpoint sets the model section and the tokenizer. Expect
about a minute on two CPU cores.
"""

from ringattn.config import Config, Data, Mesh, Model, Optimizer, Train, Validation

config = Config(
    name="finetune",
    model=Model(weights="runs/quickstart", rope_theta=40_000.0),
    data=Data(path="stdlib", seq_len=4096),
    mesh=Mesh(context=8, simulate=8),
    optimizer=Optimizer(learning_rate=3e-4, warmup_steps=10),
    train=Train(steps=50, batch_size=1),
    validation=Validation(every=50, batches=8),
)
