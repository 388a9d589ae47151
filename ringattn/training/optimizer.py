"""AdamW with clipped gradients, linear warm-up and cosine decay."""

import jax
import optax

from ringattn import config


def learning_rate(c: config.Optimizer, steps: int) -> optax.Schedule:
    """Update number (from 0) -> learning rate: up in a line to the peak, then down a cosine that ends at `steps`.

    A warm-up longer than the run is cut short with it: the peak is then never reached.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=c.learning_rate / (c.warmup_steps + 1),
        peak_value=c.learning_rate,
        warmup_steps=c.warmup_steps,
        decay_steps=max(steps, c.warmup_steps + 1),
        end_value=c.learning_rate * c.final_fraction,
    )


def optimizer(c: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clips the gradient to a global norm, then AdamW (arXiv 1711.05101) with weight decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(
            learning_rate(c, steps),
            b1=c.beta1,
            b2=c.beta2,
            weight_decay=c.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )
