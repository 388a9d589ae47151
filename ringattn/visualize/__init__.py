"""Figures of rings, masks, work and memory for README, notebooks and reports, computed with the training code.

`draw` and `animate` return SVG. `mask_figure`, `balance_figure`, `memory_figure`, `reach_figure` and `overlap_figure`
return matplotlib figures. `schedule_text`, `balance_text` and `memory_text` return text for terminals.
`python -m ringattn.visualize` writes or prints them.

.. include:: README.md
"""

from ringattn.visualize.animation import animate
from ringattn.visualize.attention_memory import (
    LLAMA,
    MemoryLaw,
    Shape,
    attention_bytes,
    fit_memory,
    growth,
    memory_curves,
)
from ringattn.visualize.curves import memory_figure, overlap_figure, reach_figure
from ringattn.visualize.diagram import draw
from ringattn.visualize.figures import balance_figure, mask_figure
from ringattn.visualize.svg import COLOURS
from ringattn.visualize.text import balance_text, memory_text, schedule_text
from ringattn.visualize.work import (
    Row,
    compute_time,
    dense_mask,
    imbalance,
    kv_owners,
    pairs_per_hop,
    sent_hops,
    token_owners,
)

__all__ = [
    "COLOURS",
    "LLAMA",
    "MemoryLaw",
    "Row",
    "Shape",
    "animate",
    "attention_bytes",
    "balance_figure",
    "balance_text",
    "compute_time",
    "dense_mask",
    "draw",
    "fit_memory",
    "growth",
    "imbalance",
    "kv_owners",
    "mask_figure",
    "memory_curves",
    "memory_figure",
    "memory_text",
    "overlap_figure",
    "pairs_per_hop",
    "reach_figure",
    "schedule_text",
    "sent_hops",
    "token_owners",
]
