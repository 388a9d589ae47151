"""Ring attention: K/V shards go round the ring, and every device folds each visitor into its own queries' result.

Ring Attention (arXiv 2310.01889), with a backward pass that lets K/V go round once more instead of keeping all
visitors. Each transfer is issued before the work that hides it, and a barrier keeps the compiler from delaying it:
what has been received must be there before the next hop's work may start. Gradients of K/V travel with their shard,
one hop late, so that they are hidden too, and then go home. Hops on which no device sees anything are not made.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringattn.attention.kernels import Keys, OfKeys, OfQueries, Queries, Rule, Saved
from ringattn.attention.mask import Mask, needed_hops
from ringattn.attention.softmax import Partial
from ringattn.layout import shard_positions


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
    """

    axis: str
    layout: str | None
    kernel: Any
    group: int = 1
    inner: str | None = None

    def forward(self, rule: Rule, queries: Queries, keys: Keys, slopes: Any, before: Partial) -> Partial:
        """Attention of this device's queries to the keys of all devices; as a kernel's `forward`."""
        own = self._own(keys)

        def visit(part, visitor, incoming):
            part = self.kernel.forward(rule, queries, self._keys(visitor), slopes, part)
            part, incoming = lax.optimization_barrier((part, incoming))
            return part, incoming

        part, visitor = before, own
        for step, hops in self._runs(rule.mask, own):
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

        def visit(of_queries, visitor, incoming, of_visitor):
            new = self.kernel.backward(rule, queries, self._keys(visitor), slopes, saved, of_queries)
            (of_queries, of_keys), incoming, of_visitor = lax.optimization_barrier((new, incoming, of_visitor))
            return of_queries, incoming, _add(of_visitor, of_keys)

        runs = self._runs(rule.mask, own)
        incoming = [self._send(own, step) for step, _ in runs] + [None]
        of_queries, visitor, of_own = visit(before, own, incoming[0], None)
        for (step, hops), following in zip(runs, incoming[1:], strict=True):

            def onward(of_queries, visitor, of_visitor, step=step):
                return visit(of_queries, visitor, self._send(visitor, step), self._shift(of_visitor, step))

            of_visitor = None
            if hops > 1:
                carry = onward(of_queries, visitor, None)
                of_queries, visitor, of_visitor = _repeat(hops - 2, onward, carry)
            of_queries, visitor, of_visitor = visit(of_queries, visitor, following, self._shift(of_visitor, step))
            of_own = _add(of_own, self._shift(of_visitor, -step * hops))
        return of_queries, of_own

    def _runs(self, mask: Mask, own: "_Visitor") -> tuple[tuple[int, int], ...]:
        members, tokens = lax.axis_size(self.axis), own.keys.tokens
        if self.layout is None:
            return plan_hops(range(1, members), members)
        # A span lets its tokens see ahead, wherever it lies.
        mask = replace(mask, causal=mask.causal and tokens.spans is None)
        shards, local = self._shards(), own.keys.key.shape[2]
        if self.inner is None:
            return plan_hops(needed_hops(mask, self.layout, shards, local // self.group, self.group), members)
        return plan_hops(needed_hops(mask, self.layout, shards, local, shards // members), members)

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
        shards = range(self.group)
        held = [shard_positions(self.layout, first + shard, self._shards(), local) for shard in shards]
        return visitor.keys._replace(tokens=visitor.keys.tokens._replace(positions=jnp.concatenate(held)[None]))

    def _shards(self) -> int:
        """Shards of the whole sequence."""
        return lax.axis_size(self.axis) * (self.group if self.inner is None else lax.axis_size(self.inner))

    def _send(self, visitor: "_Visitor", step: int) -> "_Visitor":
        return _Visitor(self._shift(visitor.keys, step), (visitor.home - step) % lax.axis_size(self.axis))

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


def _add(a: Any, b: Any) -> Any:
    return b if a is None else jax.tree.map(jnp.add, a, b)
