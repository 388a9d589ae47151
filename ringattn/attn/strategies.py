"""The strategy and the kernel of one attention call, inside the shard_map."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax
from jaxtyping import Array, Int

from ringattn.attn.auto import strategy_for
from ringattn.attn.gather import Gather
from ringattn.attn.inputs import Inputs
from ringattn.attn.kernels.protocol import Kernel
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.positions import ImpliedPositions
from ringattn.attn.ring import Ring
from ringattn.attn.settings import Axis, Settings
from ringattn.attn.ulysses import exchange

Result = TypeVar("Result")
Attend = Callable[[Inputs], Result]
AttendWith = Callable[[Kernel, Inputs], Result]
"""Attention by a kernel, or by a strategy that is one."""


@dataclass(frozen=True)
class Strategies:
    """Strategies for a call with these settings.

    Attributes:
      settings: the arguments that are not arrays.
      axis: the mesh axis, or (outer, inner), over which the sequence is sharded.
      implied: positions, if the layout implies them; None: positions are given.
    """

    settings: Settings
    axis: Axis
    implied: ImpliedPositions | None

    def choose(self, attend: AttendWith[Result], inputs: Inputs) -> Attend[Result]:
        """Returns `attend` with the strategy and the kernel that the settings name, or that "auto" picks."""
        strategy = self.settings.strategy
        if strategy == "auto":
            strategy = self._auto(inputs, device_kind())
        return self._strategy(strategy, self.kernel(inputs), attend)

    def kernel(self, inputs: Inputs) -> Kernel:
        """Returns the kernel that the settings name, or that "auto" picks."""
        (*_, heads, _), (*_, kv_heads, head_dim) = inputs.query.shape, inputs.key.shape
        head_dim = max(head_dim, inputs.value.shape[3])
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": inputs.query.dtype}
        return choose_kernel(self.settings.kernel, **shape, device_kind=device_kind()).kernel

    def _auto(self, inputs: Inputs, device: str) -> str:
        mask, axis = self.settings.mask, self.axis
        mask = replace(mask, causal=mask.causal and inputs.q_tokens.spans is None)  # a span can reach later keys
        layout = None if self.implied is None else self.settings.layout
        sizes = lax.axis_size(axis) if isinstance(axis, str) else (lax.axis_size(axis[0]), lax.axis_size(axis[1]))
        return strategy_for(inputs.query, inputs.key, mask, layout, sizes, device)

    def _strategy(self, strategy: str, kernel: Kernel, attend: AttendWith[Any]) -> Attend[Any]:
        """Returns attention by `strategy` ("auto" resolved)."""
        axis, implied, reduce_dtype = self.axis, self.implied, self.settings.reduce_dtype

        def exchange_over(exchange_axis: Axis, first_shard: int | Int[Array, ""], local_kernel: Kernel) -> Attend[Any]:
            count, tokens = lax.axis_size(exchange_axis), None
            if implied is not None:
                tokens = implied.local_tokens(first_shard, count)
            return partial(exchange, partial(attend, local_kernel), exchange_axis, tokens)

        if strategy == "gather":
            return partial(attend, Gather(axis, kernel, implied, reduce_dtype))
        if strategy == "ulysses":
            return exchange_over(axis, 0, kernel)
        if isinstance(axis, str):
            assert strategy == "ring", strategy
            return partial(attend, Ring(axis, kernel, implied, reduce_dtype=reduce_dtype))
        outer, inner = axis
        if strategy == "usp":
            first_shard = lax.axis_index(outer) * lax.axis_size(inner)
            return exchange_over(inner, first_shard, Ring(outer, kernel, implied, reduce_dtype=reduce_dtype))
        assert strategy == "ring", strategy
        # A shard on the inner ring can come from any member of the outer ring, so its positions must be sent.
        inner_ring = Ring(inner, kernel, None, reduce_dtype=reduce_dtype)
        return partial(attend, Ring(outer, inner_ring, implied, inner, reduce_dtype))


def device_kind() -> str:
    """Returns the kind of the devices of the mesh."""
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def drop_unit_axes(axes: tuple[str, ...]) -> Axis:
    """Drops axes of size 1, which turns a degenerate nested ring into a plain ring."""
    several = [name for name in axes if lax.axis_size(name) > 1] or [axes[0]]
    return several[0] if len(several) == 1 else (several[0], several[1])
