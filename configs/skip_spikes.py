"""The quickstart at three times its learning rate, with updates skipped whose gradient norm spikes.

    python scripts/train.py --config configs/skip_spikes.py

An update is skipped if its gradient norm is over 4 times the mean of the last 100, or is not finite. The terminal shows
each skipped update, and metrics.jsonl counts them as `skipped`.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="skip_spikes",
    optimizer=replace(quickstart.optimizer, learning_rate=3 * quickstart.optimizer.learning_rate, skip_spikes=4.0),
)
