"""The quickstart on four pairs of devices: a pair exchanges heads for sequence, and K/V go round the pairs.

    python scripts/train.py --config configs/usp.py

Expect the quickstart's losses, up to rounding, with three hops instead of seven. --attention.strategy ring makes it a
ring of rings: the inner rings turn once for each hop of the outer one.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="usp",
    mesh=replace(quickstart.mesh, data=1, context_outer=4, context=2),
    attention=replace(quickstart.attention, strategy="usp"),
)
