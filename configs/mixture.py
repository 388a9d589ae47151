"""Two data sources in fixed proportions: three rows of the standard library to one of this repository's source.

    python scripts/train.py --config configs/mixture.py

The small source repeats many times before the large one is exhausted. Run it from the repository root.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="mixture",
    data=replace(quickstart.data, path=("stdlib", "ringattn/**/*.py"), mixture=(3.0, 1.0), validation=0.1),
)
