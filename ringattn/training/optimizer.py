"""AdamW with gradient clipping, linear warmup and cosine decay."""

import re
from typing import Any

import jax
import optax

from ringattn import config
from ringattn.model.parallel import Params


def learning_rate(c: config.Optimizer, steps: int, start_step: int = 0) -> optax.Schedule:
    """Returns a schedule of `steps` updates from `start_step`: linear warmup to the peak, then cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=c.learning_rate / (c.warmup_steps + 1),  # not 0, so that the first update has an effect
        peak_value=c.learning_rate,
        warmup_steps=c.warmup_steps,
        decay_steps=max(steps, c.warmup_steps + 1),  # optax requires a decay, also if the run ends during warmup
        end_value=c.learning_rate * c.final_fraction,
    )
    return lambda count: schedule(count - start_step)


def _weight_decay_mask(params: Params) -> Params:
    """Returns True for matrices and False for norm scales and biases, whose stacked layers have 2 or 3 dims."""

    def is_matrix(path: Any, _: Any) -> bool:
        return not re.search("scale|bias", jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def optimizer(c: config.Optimizer) -> optax.GradientTransformation:
    """Returns clipping by global norm, followed by AdamW (arXiv 1711.05101) with weight decay on matrices only.

    The train step multiplies its updates by -learning_rate. The optimizer counts only updates; a run's schedule counts
    all steps.
    """
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.scale_by_adam(b1=c.beta1, b2=c.beta2),
        optax.add_decayed_weights(c.weight_decay, _weight_decay_mask),
    )
