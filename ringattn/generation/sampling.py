"""Sampling of the next token, on the devices."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling of the next token. The filters apply in this order: penalty, temperature, top_k, top_p, min_p.

    Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    """Divides the logits. 0: the most likely token (greedy); the filters then have no effect."""
    top_k: int | None = None
    """Samples among this number of most likely tokens. None: among all."""
    top_p: float | None = None
    """Samples among the most likely tokens whose probabilities sum to at least this (arXiv 1904.09751). None: all."""
    min_p: float | None = None
    """Samples among tokens at least this times as likely as the most likely one (arXiv 2407.01082). None: all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the row contains, and multiplies negative ones (arXiv 1909.05858)."""
    seed: int = 0
    """Seed. The samples of a prompt do not depend on the other prompts of the batch."""

    def __post_init__(self) -> None:
        def check(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"{name}={vars(self)[name]!r} must be {rule}")

        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        temperature, penalty = self.temperature, self.repetition_penalty
        rule = "from 0 (greedy) to 100, such as 0.8"
        check(is_number(temperature) and 0 <= temperature <= 100, "temperature", rule)
        check(self.top_k is None or (is_int(self.top_k) and self.top_k >= 1), "top_k", "an int of at least 1, or None")
        for name in ("top_p", "min_p"):
            value = vars(self)[name]
            rule = "more than 0 and at most 1, or None"
            check(value is None or (is_number(value) and 0 < value <= 1), name, rule)
        check(is_number(penalty) and 0.01 <= penalty <= 100, "repetition_penalty", "from 0.01 to 100; 1 has no effect")
        check(is_int(self.seed) and 0 <= self.seed < 2**32, "seed", "an int from 0 to 2**32 - 1")

    @property
    def greedy(self) -> bool:
        """True if the most likely token of the model is taken, without penalty."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def values(self, vocabulary: int) -> "Values":
        """Returns the values as arrays, so that other values compile no other program."""
        top_k = vocabulary if self.top_k is None else min(self.top_k, vocabulary)
        floats = self.temperature, self.top_p or 1.0, self.min_p or 0.0, self.repetition_penalty
        temperature, top_p, min_p, penalty = map(jnp.float32, floats)
        return Values(temperature, jnp.int32(top_k), top_p, min_p, penalty)


class Values(NamedTuple):
    """The fields of `Sampling` as arrays."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    penalty: Float[Array, ""]


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"] | None,
    values: Values,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns a token per row, and its log-probability in nats by the model, before penalty, temperature and filters.

    Args:
      logits: float32.
      seen: the tokens that each row contains. None: takes the most likely token; `keys` and `values` have no effect.
      keys: a key per row.
      values: see `Sampling`.
    """
    at = partial(jnp.take_along_axis, logits, axis=-1)
    tokens = jnp.argmax(logits, axis=-1)
    largest = at(tokens[:, None])  # cheaper than another maximum over all logits
    log_total = jnp.log(jnp.exp(logits - largest).sum(-1, keepdims=True))
    if seen is not None:
        assert keys is not None
        penalized = jnp.where(logits > 0, logits / values.penalty, logits * values.penalty)
        penalized = jnp.where(seen, penalized, logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        sampled = jnp.argmax(filtered(penalized, values) + noise, axis=-1)
        tokens = jnp.where(values.temperature > 0, sampled, jnp.argmax(penalized, axis=-1))
    tokens = tokens.astype(jnp.int32)
    return tokens, (at(tokens[:, None]) - largest - log_total)[:, 0]


def filtered(logits: Float[Array, "B V"], values: Values) -> Float[Array, "B V"]:
    """Returns logits / temperature, -inf for the tokens that the filters leave out. The most likely token stays."""
    logits = logits / jnp.maximum(values.temperature, 1e-6)
    ordered = -jnp.sort(-logits, axis=-1)
    ranks = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    ordered = jnp.where(ranks[None] < values.top_k, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered)
    before = jnp.cumsum(probs, axis=-1) - probs
    # With top_p = 1, rounding of the sum must not leave out a token.
    kept = (before < values.top_p) | (values.top_p >= 1)
    kept &= probs >= values.min_p * probs[:, :1]
    smallest = jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf).min(-1)
    return jnp.where(logits >= smallest[:, None], logits, -jnp.inf)
