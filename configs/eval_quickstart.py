"""Measures how the quickstart model uses its context: loss by position, by context length and by document kind.

    python scripts/eval.py --config configs/eval_quickstart.py

Expect one minute on two CPU cores. Results and plots are in runs/quickstart/evaluations/eval_quickstart/.
"""

from ringattn.config import Evaluation, Mesh

config = Evaluation(
    name="eval_quickstart",
    runs=("runs/quickstart",),
    tasks=("loss_by_position", "loss_by_context", "loss_by_kind"),
    lengths=(256, 512, 1024, 2048),
    samples=256,
    batch_size=4,
    mesh=Mesh(context=8, simulate=8),
)
