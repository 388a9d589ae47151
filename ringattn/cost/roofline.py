"""FLOPs and memory traffic of the ops of scheduled HLO: a roofline for compilers that estimate no cycles.

An op takes the longer of two times: its matrix products at the peak of the device, and its operands and results at the
bandwidth of the memory. Real programs are slower. A custom call reads each operand once, although an attention kernel
reads K/V once per tile of queries.
"""

import math
import re
from functools import cached_property
from typing import NamedTuple

from ringattn.cost.flops import document_pairs
from ringattn.cost.program import Op, Program

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}
"""Bits of the element types whose names do not end with their number of bits."""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "while"}
"""Ops without memory traffic of their own."""
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_ON_CHIP = re.compile(r"S\([1-4]\)")  # VMEM, semaphores and scalar memory of TPUs


class Array(NamedTuple):
    """An array of an HLO shape."""

    dims: tuple[int, ...]
    bytes: int
    """Its size, 0 in a memory other than the device's main memory."""
    size: int
    """Its size in any memory, in bytes."""
    on_host: bool


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of an HLO shape, which may be a tuple."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
        sizes = tuple(int(n) for n in dims.split(",") if n)
        size = math.prod(sizes) * bits // 8
        on_host = "S(5)" in layout
        outside = on_host or _ON_CHIP.search(layout) is not None
        found.append(Array(sizes, 0 if outside else size, size, on_host))
    return found


class Traffic(NamedTuple):
    """Work of one execution of an op."""

    flops: int
    bytes: int


class Roofline:
    """Work of the ops of a program."""

    def __init__(self, program: Program):
        self.program = program

    @cached_property
    def _named(self) -> dict[str, dict[str, Op]]:
        return {name: {op.name: op for op in ops} for name, ops in self.program.computations.items()}

    def traffic(self, computation: str, op: Op) -> Traffic:
        """Returns the work of an op; none for those that run other computations, except for fusions."""
        if op.kind in FREE or op.kind.endswith(("-start", "-done", "-update")) or op.kind in ("conditional", "call"):
            return Traffic(0, 0)
        named, called = self._named[computation], op.attribute("calls")
        if op.kind == "fusion" and called in self.program.computations:
            return Traffic(
                sum(self._flops(called, each) for each in self.program.computations[called]), self._fused(op)
            )
        read = [array for name in op.operands if name in named for array in arrays(named[name].shape)]
        own = arrays(op.shape)
        if op.kind == "dynamic-slice":
            read = own
        elif op.kind == "dynamic-update-slice":
            own = read = arrays(named[op.operands[1]].shape)
        return Traffic(self._flops(computation, op), sum(array.bytes for array in [*own, *read]))

    def _fused(self, op: Op) -> int:
        """Returns the bytes that a fusion reads and writes. Of stacks of layers, only the slices count."""
        called = op.attribute("calls") or ""
        named, total = self._named[called], sum(array.bytes for array in arrays(op.shape))
        users: dict[str, list[Op]] = {}
        for each in named.values():
            for name in each.operands:
                users.setdefault(name, []).append(each)
        for each in named.values():
            if each.kind == "dynamic-update-slice":
                update = named.get(each.operands[1])
                total -= sum(array.bytes for array in arrays(each.shape))
                total += sum(array.bytes for array in arrays(update.shape)) if update else 0
            elif each.kind == "parameter":
                using = users.get(each.name, [])
                if using and all(user.kind == "dynamic-slice" and user.operands[0] == each.name for user in using):
                    total += sum(array.bytes for user in using for array in arrays(user.shape))
                elif not any(user.kind == "dynamic-update-slice" and user.operands[0] == each.name for user in using):
                    total += sum(array.bytes for array in arrays(each.shape))
        return max(total, 0)

    def _flops(self, computation: str, op: Op) -> int:
        """Returns the FLOPs of a matrix product; 0 for all other ops."""
        named = self._named[computation]
        if "__cudnn$fmha" in op.rest:
            return self._attention_flops(named, op)
        contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)", op.rest)
        if contracted is None or op.kind not in ("dot", "custom-call") or op.operands[0] not in named:
            return 0
        left = arrays(named[op.operands[0]].shape)[0].dims
        depth = math.prod(left[int(dim)] for dim in contracted[1].replace('"', "").split(",") if dim)
        return 2 * math.prod(arrays(op.shape)[0].dims) * depth

    @staticmethod
    def _attention_flops(named: dict[str, Op], op: Op) -> int:
        """Returns the FLOPs of a cuDNN attention call on visible pairs, of query and key in layout BTNH or BNTH.

        A causal call has as many keys as queries.
        """
        query, key = (arrays(named[name].shape)[0] for name in op.operands[:2])
        keys, depth = max(key.dims[1:3]), key.dims[-1]
        rows = math.prod(query.dims) // depth  # queries of all heads and sequences
        pairs = rows * keys
        if re.search(r'"mask_type": ?"CAUSAL"', op.rest):
            window = re.search(r'"sliding_window_length": ?"?(\d+)', op.rest)
            visible = int(window[1]) if window else 0  # with the query's own key; 0 without a window
            pairs = rows // keys * document_pairs(keys, visible - 1 if visible else None)
        products = 5 if "Backward" in op.rest else 2
        return 2 * products * pairs * depth
