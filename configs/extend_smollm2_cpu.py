"""The first stage of extend_smollm2 at a size for CPU: 12 steps in rows of 2,048 tokens, with the RoPE of 16,384.

    python scripts/train.py --config configs/extend_smollm2_cpu.py
    python scripts/eval.py --config configs/eval_extend_smollm2.py

The weights are those of configs/extend_smollm2.py. Expect 13 minutes of CPU time. The loss of the original model rises
beyond 8,192 tokens; that of this run does not.
"""

from dataclasses import replace

from extend_smollm2 import config as extend_smollm2

from ringattn.config import Mesh, Stage, Validation

config = replace(
    extend_smollm2,
    name="extend_smollm2_cpu",
    data=replace(extend_smollm2.data, seq_len=2048),
    model=replace(extend_smollm2.model, remat="off"),
    mesh=Mesh(simulate=2),
    optimizer=replace(extend_smollm2.optimizer, warmup_steps=4),
    validation=Validation(every=12, batches=4),
    stages=(Stage(steps=12, seq_len=2048, batch_size=1),),
)
