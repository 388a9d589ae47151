"""Evaluates needle retrieval of the model `needle`, at five depths in rows of three lengths.

    python scripts/eval.py --config configs/eval_needle.py

Expect half a minute on two CPU cores and an accuracy of at least 0.98 in every cell. The heat map is
runs/needle/evaluations/eval_needle/plots/needle.png.
"""

from ringattn.config import Evaluation, Mesh

config = Evaluation(
    name="eval_needle",
    runs=("runs/needle",),
    tasks=("needle",),
    lengths=(128, 256, 512),
    depths=(0.0, 0.25, 0.5, 0.75, 1.0),
    samples=100,
    batch_size=25,
    mesh=Mesh(context=8, simulate=8),
)
