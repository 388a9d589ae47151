"""Pictures of rings, masks and work, for the README, notebooks and reports; all computed by the code that trains.

`draw` and `animate` give SVG, `mask_figure` and `balance_figure` figures of matplotlib, `schedule_text` and
`balance_text` text for terminals; `python -m ringattn.visualize` writes them.
"""

from ringattn.visualize.animation import animate
from ringattn.visualize.figures import balance_figure, mask_figure
from ringattn.visualize.ring import draw
from ringattn.visualize.svg import COLOURS
from ringattn.visualize.text import balance_text, schedule_text
from ringattn.visualize.work import Row, full_hops, hops_made, imbalance, owners, pairs, seen, visitors

__all__ = [
    "COLOURS",
    "Row",
    "animate",
    "balance_figure",
    "balance_text",
    "draw",
    "full_hops",
    "hops_made",
    "imbalance",
    "mask_figure",
    "owners",
    "pairs",
    "schedule_text",
    "seen",
    "visitors",
]
