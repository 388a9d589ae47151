"""Pictures of rings, masks, work and memory, for README, notebooks and reports; all computed by the code that trains.

`draw` and `animate` give SVG; `mask_figure`, `balance_figure`, `memory_figure`, `reach_figure` and `overlap_figure`
figures of matplotlib; `schedule_text`, `balance_text` and `memory_text` text for terminals.
`python -m ringattn.visualize` writes them.
"""

from ringattn.visualize.animation import animate
from ringattn.visualize.curves import memory_figure, overlap_figure, reach_figure
from ringattn.visualize.figures import balance_figure, mask_figure
from ringattn.visualize.memory import LLAMA, Need, Shape, attention_bytes, doubling, fit, memory_curves
from ringattn.visualize.ring import draw
from ringattn.visualize.svg import COLOURS
from ringattn.visualize.text import balance_text, memory_text, schedule_text
from ringattn.visualize.work import Row, full_hops, hops_made, imbalance, owners, pairs, seen, visitors

__all__ = [
    "COLOURS",
    "LLAMA",
    "Need",
    "Row",
    "Shape",
    "animate",
    "attention_bytes",
    "balance_figure",
    "balance_text",
    "doubling",
    "draw",
    "fit",
    "full_hops",
    "hops_made",
    "imbalance",
    "mask_figure",
    "memory_curves",
    "memory_figure",
    "memory_text",
    "overlap_figure",
    "owners",
    "pairs",
    "reach_figure",
    "schedule_text",
    "seen",
    "visitors",
]
