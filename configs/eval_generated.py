"""Scores answers that the model `needle` generates, by RULER's metric.

    python scripts/eval.py --config configs/eval_generated.py

Expect at least the exact match of configs/eval_needle.py: a model generates the correct answer if each of its tokens is
the most likely one. The answers are in runs/needle/evaluations/eval_generated/answers.jsonl.
"""

from dataclasses import replace

from eval_needle import config as eval_needle

config = replace(eval_needle, name="eval_generated", scoring="generation", depths=(0.0, 0.5, 1.0), samples=50)
