"""The quickstart with mesh, strategy and rematerialization chosen by the planner, for 8 simulated devices.

    python scripts/train.py --config configs/auto.py

Expect the losses of the quickstart, up to rounding, and log lines with the choice and its reasons; --mesh.simulate 4
gives another choice. ringattn/planning/README.md shows how to see the choice, and what it was compared with, before
training.
"""

from dataclasses import replace

from quickstart import config as quickstart

from ringattn.config import Mesh

config = replace(
    quickstart,
    name="auto",
    model=replace(quickstart.model, remat="auto"),
    mesh=Mesh(auto=True, simulate=8),
    attention=replace(quickstart.attention, strategy="auto"),
)
