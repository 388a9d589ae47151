"""Finds where NaN or infinity first appears in a step: in which parameters, layer or gradient, and in which rows.

A step that gives NaN or infinity freezes the state (`step.py`), so the programs here compute it again from exactly the
same parameters and batch. They are compiled only then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Bool, Int

from ringattn.data import Batch
from ringattn.mesh.axes import TOKENS
from ringattn.model.build import MakeModel, model_factory
from ringattn.model.families import layer_pattern, output_soft_cap
from ringattn.model.loss import token_losses
from ringattn.model.parallel import Params, embed
from ringattn.model.pattern import Place, fold_layers
from ringattn.model.transformer import Layer, layer_rotations
from ringattn.runs.progress import Display
from ringattn.runs.verification import named
from ringattn.runs.watchdog import Watchdog
from ringattn.training.recorder import NonFiniteError
from ringattn.training.stage import Run
from ringattn.training.step import TrainState, make_gradient
from ringattn.units import first_line

MAX_LISTED = 8
"""Maximum number of rows, or of names of parameters, in a message."""
MAX_TEXT = 40
"""Maximum number of characters of a row in a message."""

LAYERS = "layers."
"""Prefix of the names of parameters whose dim 0 is the layer."""


Rows = Int[np.ndarray, " rows"]
"""Indices of rows in a batch."""


class FiniteRows(NamedTuple):
    """True for the rows [microbatches, B] in which all numbers of a part of the forward pass are finite."""

    embedding: Any
    layers: Any
    """[microbatches, N, 2, B]: output of all heads of each layer, then output of the layer."""
    hidden: Any
    """Output of the final norm."""
    losses: Any
    """Weighted losses of the tokens."""


@contextmanager
def diagnosed(run: Run, state: Callable[[], TrainState], display: Display, watchdog: Watchdog) -> Iterator[None]:
    """Adds to a NonFiniteError where NaN or infinity first appears. `state()` is the state that the step froze, or
    that the validation used.

    Raises ValueError. Use it in all processes, under the mesh.
    """
    try:
        yield
    except NonFiniteError as error:
        again = f"computing the {'validation' if error.validation else 'step'} again"
        display.print(f"{error.problem} at step {error.step}: {again} to find the first layer")
        try:
            with watchdog.patient():
                if error.validation:
                    cause = _diagnose_validation(run, state().params, watchdog)
                else:
                    cause = diagnose(run, state().params, error.step)
        except Exception as failure:  # such as a lack of memory; the problem itself must still be reported
            cause = f"{again} failed ({first_line(failure)})"
        raise ValueError(error.message(cause)) from None


def diagnose(run: Run, params: Params, step: int) -> str:
    """Returns where NaN or infinity first appears in the update `step`, computed from `params`."""
    if damaged := _not_finite(_finite_params(params)):
        return f"the parameters before this step contain NaN or infinity: {_listed(damaged)}"
    batch = run.training.batch(step - 1 - run.start_step)
    if text := _Forward(run, params).not_finite(batch):
        return text
    if found := _first_in_gradient(_Gradient(run, params, batch)):
        text, row = found
        rows = "" if row is None else f", even of only {_rows(run, batch, np.array([row]))}"
        return f"the losses are finite; not finite first in the backward pass: {text}{rows}"
    return "the same step, computed again from the same parameters, is finite: suspect faulty hardware"


def _diagnose_validation(run: Run, params: Params, watchdog: Watchdog) -> str:
    """Returns where NaN or infinity first appears in a validation of `params`."""
    if damaged := _not_finite(_finite_params(params)):
        return f"the parameters contain NaN or infinity: {_listed(damaged)}"
    forward = _Forward(run, params)
    for index in range(run.validation_batches):
        if text := forward.not_finite(run.held_out.batch(index)):
            return f"batch {index} of the validation: {text}"
        watchdog.progress("a batch of the validation")
    return "the same validation, computed again, is finite: suspect faulty hardware"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + f" and {rest} more" * (rest > 0)


def _rows(run: Run, batch: Batch, rows: Rows) -> str:
    """Returns the indices of `rows` in words, and the beginning of the first."""
    size = batch.tokens.shape[0]
    if rows.size == size > 1:
        return f"all {size} rows of the batch"
    text = repr(run.tokenizer.decode(batch.tokens[rows[0]])[:MAX_TEXT])
    numbers = f"row{'s' * (rows.size > 1)} {_listed([str(row) for row in rows])} (0 to {size - 1}) of the batch"
    return f"{numbers}; row {rows[0]} begins with {text}"


@jax.jit
def _finite_params(params: Params) -> dict[str, Bool[Array, "..."]]:
    """Returns True for each parameter that is finite; for those of all layers, for each layer."""

    def finite(name: str, x: Array) -> Bool[Array, "..."]:
        flags = jnp.isfinite(x).all(axis=tuple(range(name.startswith(LAYERS), x.ndim)))
        return jax.reshard(flags, P(*[None] * flags.ndim))

    return {name.removesuffix(".value"): finite(name, x) for name, x in named(params).items()}


def _not_finite(finite: dict[str, Bool[Array, "..."]]) -> list[str]:
    """Returns the names of parameters that are not finite, from the input of the model to its output."""
    flags = {name: np.asarray(value) for name, value in jax.device_get(finite).items()}
    layers = max(value.size for name, value in flags.items() if name.startswith(LAYERS))
    inside = [
        f"layer {layer}'s {name.removeprefix(LAYERS)}"
        for layer in range(layers)
        for name, value in flags.items()
        if name.startswith(LAYERS) and not value[layer]
    ]
    outside = [name for name, value in flags.items() if not name.startswith(LAYERS) and not value]
    return (
        [name for name in outside if name == "embedding"] + inside + [name for name in outside if name != "embedding"]
    )


def _finite_rows(x: Array, dim: int = 0) -> Bool[Array, " B"]:
    """Returns True for the rows, along `dim`, whose numbers are all finite; replicated."""
    rows = jnp.isfinite(x).all(axis=tuple(axis for axis in range(x.ndim) if axis != dim))
    return jax.reshard(rows, P(None))


def _make_forward(make_model: MakeModel, vocabulary: int) -> Callable[[Params, Batch], FiniteRows]:
    """Returns a jitted forward(params, batch [microbatches, B, L]) without gradient."""
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def forward(params: Params, batch: Batch) -> FiniteRows:
        model = nnx.merge(graphdef, params)
        ids = jax.tree.map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))
        tokens, positions, segment_ids = jax.reshard(ids, TOKENS)
        angles, (layer_graphdef, layer_params) = layer_rotations(model.config, positions), nnx.split(model.layers)

        def layer(carry: Any, values: Params, where: Place) -> Any:
            x, finite, index = carry
            module: Layer = nnx.merge(layer_graphdef, values)
            heads = module.attention.heads(x, angles[where.kind], segment_ids, where.kind)
            x = module.finish(x, heads)
            both = jnp.stack([_finite_rows(heads, heads.ndim - 4), _finite_rows(x)])  # heads may be in groups
            return x, lax.dynamic_update_index_in_dim(finite, both, index, 0), index + 1

        x = model.scaled(embed(tokens, model.embedding[...], model.config.dtype))
        embedded, initial = _finite_rows(x), jnp.zeros((model.config.layers, 2, x.shape[0]), bool)
        x, layers, _ = fold_layers(layer, (x, initial, jnp.int32(0)), layer_params, layer_pattern(model.config))
        hidden = model.norm(x)
        output, soft_cap = model.output_table(), output_soft_cap(model.config)
        losses = jnp.asarray(batch.weights) * token_losses(
            hidden, output, jnp.asarray(batch.targets), vocabulary, soft_cap
        )
        return FiniteRows(embedded, layers, _finite_rows(hidden), _finite_rows(losses))

    return jax.jit(lambda params, batch: lax.map(lambda microbatch: forward(params, microbatch), batch))


def _first_in_forward(finite: FiniteRows) -> tuple[str, Rows] | None:
    """Returns the first part of the forward pass that is not finite in some row, and all rows with such a part."""
    parts = {"the embedding": finite.embedding}
    for layer in range(finite.layers.shape[1]):
        parts[f"the attention of layer {layer}"] = finite.layers[:, layer, 0]
        parts[f"the output of layer {layer}"] = finite.layers[:, layer, 1]
    parts |= {"the final norm": finite.hidden, "the losses": finite.losses}
    rows = np.flatnonzero(~np.logical_and.reduce(list(parts.values())))
    return (next(part for part, flags in parts.items() if not flags.all()), rows) if rows.size else None


class _Forward:
    """Finds the first part of the forward pass that is not finite."""

    def __init__(self, run: Run, params: Params):
        self._run, self._params = run, params
        self._forward = _make_forward(model_factory(run.config, run.tokenizer.size), run.tokenizer.size)

    def not_finite(self, batch: Batch) -> str:
        """Returns the first part that is not finite and its rows in words; "" if all parts are finite."""
        found = _first_in_forward(jax.device_get(self._forward(self._params, self._run.place(batch))))
        return f"not finite first: {found[0]}, in {_rows(self._run, batch, found[1])}" if found else ""


class _Gradient:
    """Finds gradients that are not finite, of the losses of some rows of a batch."""

    def __init__(self, run: Run, params: Params, batch: Batch):
        gradient_of = make_gradient(model_factory(run.config, run.tokenizer.size), run.tokenizer.size)
        self._run, self._params = run, params
        # Normalized over all rows, so that each loss has the weight that it has in the train step.
        self._batch = batch._replace(weights=batch.weights / batch.weights.sum())
        self._finite = jax.jit(lambda params, batch: _finite_params(gradient_of(params, batch)[1]))

    @property
    def rows(self) -> Rows:
        return np.arange(self._batch.tokens.shape[0])

    def not_finite(self, rows: Rows) -> list[str]:
        """Returns the names of parameters whose gradient is not finite, from the output of the model to its input."""
        # Copies replace the other rows: a weight of 0 alone would not do, because 0 times infinity is NaN.
        index = np.where(np.isin(self.rows, rows), self.rows, rows[0])
        weights = self._batch.weights * np.isin(self.rows, rows).astype(np.float32)[:, None]
        batch = jax.tree.map(lambda array: array[index], self._batch._replace(weights=weights))
        return _not_finite(self._finite(self._params, self._run.place(batch)))[::-1]


def _first_in_gradient(gradient: _Gradient) -> tuple[str, int | None] | None:
    """Returns the gradients that are first not finite in the backward pass, and a row that suffices for that.

    The row is None if no single row suffices. Returns None if the gradient is finite.
    """
    rows, names = gradient.rows, gradient.not_finite(gradient.rows)
    if not names:
        return None
    first = [name for name in names if name.partition(".")[0] == names[0].partition(".")[0]]  # of the same module
    while rows.size > 1:
        rows = next((half for half in np.array_split(rows, 2) if gradient.not_finite(half)), rows[:0])
    return f"the gradient of {_listed(first[::-1])}", int(rows[0]) if rows.size else None
