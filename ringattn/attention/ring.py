"""Ring attention: K/V shards go round the ring, and every device folds each visitor into its own queries' result.

Ring Attention (arXiv 2310.01889), with a backward pass that lets K/V go round once more instead of keeping all
visitors. Each transfer is issued before the work that hides it, and a barrier keeps the compiler from delaying it:
what has been received must be there before the next hop's work may start. Gradients of K/V travel with their shard,
one hop late, so that they are hidden too, and go home behind a part of the own shard's work that is kept for it. Hops
on which no device sees anything are not made.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringattn.attention.kernels import Keys, OfKeys, OfQueries, Queries, Rule, Saved
from ringattn.attention.mask import Mask, needed_hops
from ringattn.attention.softmax import Partial
from ringattn.layout import positions_of


@dataclass(frozen=True)
class Ring:
    """A ring over mesh axis `axis`, as it is known before tracing.

    Attributes:
      axis: the mesh axis whose devices are the ring's members.
      layout: how the whole sequence lies, so that a visitor's positions are known from where it comes from; None
        where positions are the caller's own, which then travel, too.
      kernel: what computes queries against one visitor: a kernel, or the ring over an inner axis (a nested ring, for
        which the outer axis is used once per inner turn).
      group: shards of the layout that share a member (of an exchange over an inner axis), or
      inner: the inner axis, whose devices hold one shard each of a member's (of a nested ring).
      reduce_dtype: the dtype in which gradients of K/V travel; None: that in which they are summed.
    """

    axis: str
    layout: str | None
    kernel: Any
    group: int = 1
    inner: str | None = None
    reduce_dtype: str | None = None

    def forward(self, rule: Rule, queries: Queries, keys: Keys, slopes: Any, before: Partial) -> Partial:
        """Attention of this device's queries to the keys of all devices; as a kernel's `forward`."""
        own = self._own(keys)

        def visit(part, visitor, incoming):
            part = self.kernel.forward(rule, queries, self._keys(visitor), slopes, part)
            part, incoming = lax.optimization_barrier((part, incoming))
            return part, incoming

        part, visitor = before, own
        for step, hops in self._runs(rule.mask, queries, own):
            # Leave from home while the visitor before is at work, then from device to device.
            part, visitor = visit(part, visitor, self._send(own, step))

            def onward(part, visitor, step=step):
                return visit(part, visitor, self._send(visitor, step))

            part, visitor = _repeat(hops - 1, onward, (part, visitor))
        part, _ = visit(part, visitor, None)
        return part

    def backward(
        self, rule: Rule, queries: Queries, keys: Keys, slopes: Any, saved: Saved, before: OfQueries
    ) -> tuple[OfQueries, OfKeys]:
        """Gradients of this device's queries and keys; as a kernel's `backward`."""
        own = self._own(keys)
        runs = self._runs(rule.mask, queries, own)

        def fold(of_queries, keys, sent):
            new = self.kernel.backward(rule, queries, keys, slopes, saved, of_queries)
            (of_queries, of_keys), sent = lax.optimization_barrier((new, sent))
            return of_queries, of_keys, sent

        # One half of the own keys hides the first departure, the other the homecoming of the visitors' gradients.
        early, *late = _halves(self._keys(own)) if runs else [self._keys(own)]
        departures = [self._send(own, step) for step, _ in runs] + [None]
        of_queries, of_early, visitor = fold(before, early, departures[0])
        home = []
        for (step, hops), departure in zip(runs, departures[1:], strict=True):

            def visit(of_queries, visitor, arrived, of_keys, incoming, step=step):
                # The gradients of the visitor before travel while this one is at work. What arrived of them and what
                # is new are summed here, and not at the end of a turn, where the sum would take one more buffer.
                sent = incoming, self._send_gradients(_add(arrived, of_keys), step)
                of_queries, of_keys, (incoming, arrived) = fold(of_queries, self._keys(visitor), sent)
                return of_queries, incoming, arrived, of_keys

            def onward(of_queries, visitor, arrived, of_keys, step=step, visit=visit):
                return visit(of_queries, visitor, arrived, of_keys, self._send(visitor, step))

            arrived = of_keys = None
            if hops > 1:
                of_queries, visitor, _, of_keys = onward(of_queries, visitor, None, None)
                arrived = jax.tree.map(jnp.zeros_like, of_keys)
                carry = of_queries, visitor, arrived, of_keys
                of_queries, visitor, arrived, of_keys = _repeat(hops - 2, onward, carry)
            of_queries, visitor, arrived, of_keys = visit(of_queries, visitor, arrived, of_keys, departure)
            home.append(self._send_gradients(_add(arrived, of_keys), -step * hops))
        of_own = [of_early]
        for keys in late:
            of_queries, of_late, home = fold(of_queries, keys, home)
            of_own.append(of_late)
        of_own = OfKeys(*(jnp.concatenate(parts, 2) for parts in zip(*of_own, strict=True)))
        return of_queries, reduce(_add, home, of_own)

    def _runs(self, mask: Mask, queries: Queries, own: "_Visitor") -> tuple[tuple[int, int], ...]:
        members, tokens = lax.axis_size(self.axis), own.keys.tokens
        if self.layout is None:
            return plan_hops(range(1, members), members)
        # A span lets its tokens see ahead, wherever it lies.
        mask = replace(mask, causal=mask.causal and tokens.spans is None)
        lengths = queries.query.shape[3] // self.group, own.keys.key.shape[2] // self.group
        group = self._shards() // members
        return plan_hops(needed_hops(mask, self.layout, self._shards(), *lengths, group), members)

    def _own(self, keys: Keys) -> "_Visitor":
        tokens = keys.tokens if self.layout is None else keys.tokens._replace(positions=None)
        return _Visitor(keys._replace(tokens=tokens), lax.axis_index(self.axis))

    def _keys(self, visitor: "_Visitor") -> Keys:
        """The visitor's keys with their positions."""
        if self.layout is None:
            return visitor.keys
        first, local = visitor.home * self.group, visitor.keys.key.shape[2] // self.group
        if self.inner is not None:
            first = visitor.home * lax.axis_size(self.inner) + lax.axis_index(self.inner)
        held = positions_of(self.layout, first, self.group, self._shards(), local)
        return visitor.keys._replace(tokens=visitor.keys.tokens._replace(positions=held[None]))

    def _shards(self) -> int:
        """Shards of the whole sequence."""
        return lax.axis_size(self.axis) * (self.group if self.inner is None else lax.axis_size(self.inner))

    def _send(self, visitor: "_Visitor", step: int) -> "_Visitor":
        return _Visitor(self._shift(visitor.keys, step), (visitor.home - step) % lax.axis_size(self.axis))

    def _send_gradients(self, x: OfKeys | None, step: int) -> OfKeys | None:
        """As `_shift`, in the dtype in which gradients are to travel; summed they are in their own."""
        if x is None:
            return None
        wire = self._shift(OfKeys(*(each.astype(self.reduce_dtype or each.dtype) for each in x)), step)
        return OfKeys(*(sent.astype(each.dtype) for sent, each in zip(wire, x, strict=True)))

    def _shift(self, x: Any, step: int) -> Any:
        """What the device `step` before this one on the ring holds as x (any pytree)."""
        shards = lax.axis_size(self.axis)
        to = [(device, (device + step) % shards) for device in range(shards)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis, to), x)


def plan_hops(needed: Collection[int], members: int) -> tuple[tuple[int, int], ...]:
    """Runs of (step, hops): K/V move `step` members along the ring, `hops` times, starting from home.

    A window that reaches a few shards back needs a few hops; if it reaches forward, too, a second run the other way
    round. `needed` are the distances, 0 < h < members, from which some member needs keys.
    """
    # Up to the widest gap with steps of +1, what lies beyond it with steps of -1.
    stops = [0, *sorted(needed), members]
    gap = max(range(len(stops) - 1), key=lambda n: (stops[n + 1] - stops[n], n))
    runs = (1, stops[gap]), (-1, members - stops[gap + 1])
    return tuple((step, hops) for step, hops in runs if hops)


class _Visitor(NamedTuple):
    """A shard of keys, and the device it belongs to."""

    keys: Keys
    home: Any


def _repeat(times: int, f: Any, carry: Any) -> Any:
    """carry = f(*carry), so often, in a loop that XLA keeps: unrolled, it would hold every hop's memory at once."""
    return lax.scan(lambda carry, _: (f(*carry), None), carry, length=times)[0] if times else carry


def _halves(keys: Keys) -> list[Keys]:
    """The keys in two parts, or in one if there is but one key."""
    length = keys.key.shape[2]

    def part(start: int, stop: int) -> Keys:
        tokens = jax.tree.map(lambda x: x[:, start:stop], keys.tokens)
        return Keys(keys.key[:, :, start:stop], keys.value[:, :, start:stop], tokens)

    middle = (length + 1) // 2
    return [part(0, middle), part(middle, length)] if length > 1 else [keys]


def _add(a: Any, b: Any) -> Any:
    return b if a is None else jax.tree.map(jnp.add, a, b)
