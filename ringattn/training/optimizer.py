"""AdamW with clipped gradients, linear warm-up and cosine decay."""

import jax
import optax

from ringattn import config
from ringattn.model import Params


def learning_rate(c: config.Optimizer, steps: int, first: int = 0) -> optax.Schedule:
    """Updates done (from 0) -> learning rate: up in a line to the peak, then down a cosine that ends after `steps`.

    Both begin anew once `first` updates are done, those of the stages before.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=c.learning_rate / (c.warmup_steps + 1),  # not 0: the first update is to do something
        peak_value=c.learning_rate,
        warmup_steps=c.warmup_steps,
        decay_steps=max(steps, c.warmup_steps + 1),  # a run that ends within the warm-up has no decay
        end_value=c.learning_rate * c.final_fraction,
    )
    return lambda count: schedule(count - first)


def _matrices(params: Params) -> Params:
    """Which parameters are matrices: all but the norms' scales, although these are stacked over the layers, too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in jax.tree_util.keystr(path), params)


def optimizer(c: config.Optimizer, steps: int, first: int = 0) -> optax.GradientTransformation:
    """Clips the gradient to a global norm, then AdamW (arXiv 1711.05101) with weight decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(
            learning_rate(c, steps, first),
            b1=c.beta1,
            b2=c.beta2,
            weight_decay=c.weight_decay,
            mask=_matrices,
        ),
    )
