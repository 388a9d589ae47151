"""The quickstart with USP on four pairs of devices: all-to-all within each pair, and a ring over the pairs.

    python scripts/train.py --config configs/usp.py

Expect the losses of the quickstart, up to rounding, with three hops instead of seven. --attention.strategy ring gives a
nested ring: K/V rotate once through the inner ring per hop of the outer ring.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="usp",
    mesh=replace(quickstart.mesh, data=1, context_outer=4, context=2),
    attention=replace(quickstart.attention, strategy="usp"),
)
