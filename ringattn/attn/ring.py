"""Ring attention (arXiv 2310.01889): K/V shards rotate; each device attends with its queries to the shard it holds.

Forward. Each device attends to its local K/V shard, then to one remote shard per hop; each kernel call continues the
online softmax. Each send overlaps with compute on the shard that is sent.

Backward. The K/V rotate a second time, so that no remote shard is kept from the forward pass. The gradients dK/dV of a
shard travel one hop behind their shard: while computing with shard h, a device sends the gradients of shard h - 1. A
final send returns them to the owner during compute on half of the local shard. With n >= 2 hops in one direction:

    compute                send K/V      send dK/dV
    local, first half      first send    -
    remote 1               remote 1      -
    remote h = 2 .. n - 1  remote h      of remote h - 1
    remote n               -             of remote n - 1
    local, second half     -             of remote n, to its owner (final send)

Barriers. Without the optimization barrier between two hops, XLA could start a transfer after its hop's compute.
Hops. Hops that no device needs are omitted. The others form one run (direction, hops) per direction: see `hops.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ringattn.attn.hops import hop_runs
from ringattn.attn.kernels.protocol import KV, Kernel, KVGrads, LogitSpec, Queries, QueryGrads, Residuals, Slopes
from ringattn.attn.mask import Ids, Mask, Runs, Tokens
from ringattn.attn.positions import ImpliedPositions
from ringattn.attn.softmax import Partial

State = TypeVar("State")
InFlight = TypeVar("InFlight")  # pytree of arrays that are being sent; the receiver gets the same structure


class _Shard(NamedTuple):
    """A K/V shard as it is sent around the ring."""

    key: Float[Array, "B G M D"]
    value: Float[Array, "B G M Dv"]
    positions: Ids | None  # None if the layout implies them
    segments: Ids | None
    spans: Ids | None
    runs: Runs | None  # static
    owner: Int[Array, ""]  # index of the member whose local shard this is


class _BackwardState(NamedTuple):
    """State between two hops of the backward pass. dK/dV of the previous remote shard are `received` + `added`."""

    query_grads: QueryGrads | None
    remote: _Shard | None  # the shard to compute with next; None after the last hop
    received: KVGrads | None  # computed by the devices before this one; None before the second hop of a run
    added: KVGrads | None  # computed by this device; None before the first hop of a run


@dataclass(frozen=True)
class Ring:
    """A ring over a mesh axis.

    Attributes:
      axis: the mesh axis whose devices are the members of the ring.
      kernel: applied at each hop; in a nested ring, the Ring over the inner axis.
      implied: positions, if the layout implies them; None: positions are given, and sent with their shard.
      inner: the inner axis of a nested ring, where a member is several devices with one shard each. None: a member
        is one device with all of its shards (several under USP).
      reduce_dtype: dtype in which dK/dV are sent; None: the dtype in which they are summed.
    """

    axis: str
    kernel: Kernel
    implied: ImpliedPositions | None
    inner: str | None = None
    reduce_dtype: str | None = None

    def forward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        carry: Partial | None,
        dtype: DTypeLike | None = None,
    ) -> Partial:
        """See `protocol.Kernel.forward`."""

        def compute(part: Partial | None, kv: KV, in_flight: InFlight) -> tuple[Partial, InFlight]:
            part = self.kernel.forward(spec, queries, kv, slopes, part)
            return lax.optimization_barrier((part, in_flight))

        def subsequent_hop(direction: int, state: tuple[Partial, _Shard]) -> tuple[Partial, _Shard]:
            part, remote = state
            return compute(part, self._kv(remote), self._send(remote, direction))

        part, current = carry, kv
        for direction, hops in self._runs(spec.mask, kv):
            # The first send overlaps with compute on the local shard, or on the last remote shard of the previous run.
            part, remote = compute(part, current, self._send(self._local_shard(kv), direction))
            part, remote = _repeat(hops - 1, partial(subsequent_hop, direction), (part, remote))
            current = self._kv(remote)
        return self.kernel.forward(spec, queries, current, slopes, part, dtype)

    def backward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        residuals: Residuals,
        carry: QueryGrads | None,
        dtype: DTypeLike | None = None,
    ) -> tuple[QueryGrads, KVGrads]:
        """See `protocol.Kernel.backward`."""
        local, runs = self._local_shard(kv), self._runs(spec.mask, kv)

        def compute(carry: QueryGrads | None, kv: KV, in_flight: InFlight) -> tuple[QueryGrads, KVGrads, InFlight]:
            new = self.kernel.backward(spec, queries, kv, slopes, residuals, carry)
            (query_grads, kv_grads), in_flight = lax.optimization_barrier((new, in_flight))
            return query_grads, kv_grads, in_flight

        def hop(direction: int, state: _BackwardState, kv_sent: _Shard | None) -> _BackwardState:
            query_grads, remote, received, added = state
            assert remote is not None
            # Add here, because a sum at the end of the previous hop would need one more buffer.
            grads_sent = None if added is None else self._send_grads(_add(received, added), direction)
            query_grads, added, (remote, received) = compute(query_grads, self._kv(remote), (kv_sent, grads_sent))
            return _BackwardState(query_grads, remote, received, added)

        def subsequent_hop(direction: int, state: _BackwardState) -> _BackwardState:
            return hop(direction, state, state.remote and self._send(state.remote, direction))

        *first_half, last = kv.halves() if runs else [kv]  # no first half without hops, or with shards of one key
        first_sends = [self._send(local, direction) for direction, _ in runs] + [None]
        query_grads, remote, local_grads, final_sends = carry, first_sends[0], [], []
        for half in first_half:
            query_grads, grads, remote = compute(query_grads, half, remote)
            local_grads.append(grads)
        for (direction, hops), next_first_send in zip(runs, first_sends[1:], strict=True):
            state = _BackwardState(query_grads, remote, None, None)
            if hops > 1:
                state = subsequent_hop(direction, state)
                # lax.scan requires a fixed carry structure: zeros instead of None, where no gradients were received.
                state = state._replace(received=jax.tree.map(jnp.zeros_like, state.added))
                state = _repeat(hops - 2, partial(subsequent_hop, direction), state)
            query_grads, remote, received, added = hop(direction, state, next_first_send)
            assert added is not None
            final_sends.append(self._send_grads(_add(received, added), -direction * hops))
        new = self.kernel.backward(spec, queries, last, slopes, residuals, query_grads, dtype)  # during the final sends
        (query_grads, grads), final_sends = lax.optimization_barrier((new, final_sends))
        key_grads, value_grads = (jnp.concatenate(halves, 2) for halves in zip(*local_grads, grads, strict=True))
        return query_grads, reduce(_add, final_sends, KVGrads(key_grads, value_grads))

    def _runs(self, mask: Mask, kv: KV) -> tuple[tuple[int, int], ...]:
        return hop_runs(mask, kv.tokens.spans is not None, self.implied, lax.axis_size(self.axis))

    def _local_shard(self, kv: KV) -> _Shard:
        positions, segments, spans, runs = kv.tokens
        positions = positions if self.implied is None else None
        runs = replace(runs, keys="remote") if runs is not None and runs.keys == "local" else runs
        return _Shard(kv.key, kv.value, positions, segments, spans, runs, lax.axis_index(self.axis))

    def _kv(self, shard: _Shard) -> KV:
        """Returns the K/V of a shard with their positions."""
        if self.implied is None:
            assert shard.positions is not None  # sent, unless the layout implies them
            tokens = Tokens(shard.positions)
        else:
            first = shard.owner * (count := self.implied.shards // lax.axis_size(self.axis))
            if self.inner is not None:
                first, count = first + lax.axis_index(self.inner), 1
            tokens = self.implied.kv_tokens(first, count)
        return KV(shard.key, shard.value, Tokens(tokens.positions, shard.segments, shard.spans, shard.runs))

    def _send(self, shard: _Shard, direction: int) -> _Shard:
        """Sends `shard` to the next member in `direction`. Returns the shard received from the previous one."""
        return _Shard(*self._shift(shard[:-1], direction), (shard.owner - direction) % lax.axis_size(self.axis))

    def _send_grads(self, grads: KVGrads, offset: int) -> KVGrads:
        """Sends dK/dV in `reduce_dtype` to the member at `offset`. Returns those received."""
        sent = self._shift(KVGrads(*(x.astype(self.reduce_dtype or x.dtype) for x in grads)), offset)
        return KVGrads(*(received.astype(x.dtype) for received, x in zip(sent, grads, strict=True)))

    def _shift(self, arrays: InFlight, offset: int) -> InFlight:
        pairs = [(n, (n + offset) % lax.axis_size(self.axis)) for n in range(lax.axis_size(self.axis))]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), arrays)


def _repeat(times: int, f: Callable[[State], State], state: State) -> State:
    """Applies f `times` times with lax.scan. Without it, XLA would keep every hop's buffers alive."""
    return lax.scan(lambda state, _: (f(state), None), state, length=times)[0] if times else state


def _add(a: KVGrads | None, b: KVGrads) -> KVGrads:
    return b if a is None else jax.tree.map(jnp.add, a, b)
