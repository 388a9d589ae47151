"""Random programs for `attention`, random inputs, and their comparison with the float64 oracle."""

import io
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import conftest  # noqa: F401  sets eight devices and strict promotion before JAX starts, also outside pytest
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from ringattn import Mask, attention, permute
from ringattn.attn.kernels import registry
from ringattn.attn.reference import reference_attention
from ringattn.layout import LAYOUTS

AXES = ("context",), ("context_outer", "context")


@dataclass(frozen=True)
class Program:
    """The static part of a case: shapes, mesh and settings. Two sizes of `ring` are (outer, inner)."""

    length: int = 64
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    batch: int = 2
    layout: str = "contiguous"
    strategy: str = "ring"
    ring: tuple[int, ...] = (4,)
    others: tuple[int, int] = (1, 1)  # sizes of the data and tensor axes
    explicit: bool = True
    mask: Mask = Mask()
    extras: frozenset[str] = frozenset()  # given ones of segment_ids, span_ids, positions, sinks, slopes
    scale: float | None = None
    soft_cap: float | None = None
    dtype: str = "float32"
    queries: int | None = None  # number of queries, the last tokens; None: all tokens
    kernel: str = "auto"

    @property
    def shards(self) -> int:
        return math.prod(self.ring)

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.queries or self.length, self.length

    @property
    def logit_options(self) -> dict[str, Any]:
        return {"mask": self.mask, "scale": self.scale, "soft_cap": self.soft_cap}

    @property
    def kind(self) -> str:
        """The class for which the command reports the worst case."""
        loose = " cap+sinks" if self.soft_cap is not None and "sinks" in self.extras else ""
        nested = "nested " if len(self.ring) > 1 and self.strategy == "ring" else ""
        cross = " cross" if self.queries else ""
        kernel = "" if self.kernel == "auto" else f"{self.kernel} "
        return f"{kernel}{nested}{self.strategy} {self.dtype}{loose}{cross}"


def draw_program(source: random.Random) -> Program:
    """Draws a program for eight devices that is small enough for a dense oracle."""
    strategy = source.choice(["ring"] * 3 + ["nested", "gather", "ulysses", "usp"])
    outer_inner = [(2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (1, 3), (4, 1)]
    two = strategy in ("nested", "usp") or (strategy != "ring" and source.random() < 0.2)
    ring = source.choice(outer_inner) if two else (source.randint(1, 8),)
    free = 8 // math.prod(ring)
    others = source.choice([(d, t) for d in (1, 2) for t in (1, 2) if d * t <= free] + [(1, 1)] * 2)
    layout = source.choice(LAYOUTS)
    unit = math.prod(ring) * (2 if layout == "zigzag" else 1)
    split = others[1] * {"ulysses": math.prod(ring), "usp": ring[-1]}.get(strategy, 1)
    groups, shared = split * source.choice([1, 1, 2, 3] if split == 1 else [1]), source.choice([1, 2, 3, 4])
    batch = others[0] * source.choice([1, 2]) if others[0] == 1 else others[0]
    most = min(1024, int((2**23 / (batch * groups * shared)) ** 0.5))  # bounds the memory of the oracle's logits
    length = unit * max(-(-8 // unit), int(2 ** source.uniform(0, math.log2(most // unit))))
    depth = source.choice([4, 8, 16, 32])

    def upto(n: int) -> int:
        return int(2 ** source.uniform(0, math.log2(n + 1))) - source.choice([0, 1])

    window = source.choice([None, None, upto(length), (upto(length), upto(length))])
    extras = {"segment_ids": 0.45, "span_ids": 0.2, "positions": 0.2, "sinks": 0.3, "slopes": 0.3}
    return Program(
        length=length,
        queries=unit * source.randint(1, length // unit) if source.random() < 0.2 else None,
        heads=(groups * shared, groups),
        dims=(depth, source.choice([depth, depth, 12])),
        batch=batch,
        layout=layout,
        strategy="ring" if strategy == "nested" else strategy,
        ring=ring,
        others=others,
        explicit=source.random() < 0.5,
        mask=Mask(source.random() < 0.7, window, source.choice([None] * 4 + [1 + upto(length)])),
        extras=frozenset(name for name, chance in extras.items() if source.random() < chance),
        scale=source.choice([None, None, 0.3]),
        soft_cap=source.choice([None, None, 2.0, 30.0]),
        dtype=source.choice(["float32", "float32", "bfloat16"]),
    )


def draw_arrays(program: Program, seed: int) -> dict[str, np.ndarray]:
    """Draws inputs and the cotangent d_out of the output, in the program's layout."""
    rng, (H, G), (D, Dv) = np.random.default_rng(seed), program.heads, program.dims
    queries, keys = program.lengths
    shapes = {"query": (queries, H, D), "key": (keys, G, D), "value": (keys, G, Dv), "d_out": (queries, H, Dv)}
    arrays = {name: rng.standard_normal((program.batch, *shape)) for name, shape in shapes.items()}
    arrays = {name: x.astype(jnp.dtype(program.dtype)) for name, x in arrays.items()}
    sinks, slopes = rng.standard_normal(H), 2.0 ** -rng.uniform(1, 8, H)
    natural = _draw_tokens(rng, program.batch, program.length)
    if "segment_ids" not in program.extras:
        natural["positions"] = rng.integers(0, program.length, (program.batch, program.length), np.int32)
    tokens = {name: in_layout(program, x) for name, x in natural.items()}
    extras = tokens | {"sinks": sinks.astype(np.float32), "slopes": slopes.astype(np.float32)}
    return arrays | {name: extras[name] for name in sorted(program.extras)}


def in_layout(program: Program, ids: np.ndarray) -> Any:
    """Returns ids [B, length] in the program's layout; with fewer queries a pair, (queries, keys)."""
    kv_ids = permute(ids, program.layout, program.shards)
    if program.queries is None:
        return kv_ids
    return permute(ids[:, -program.queries :], program.layout, program.shards), kv_ids


def _draw_tokens(rng: np.random.Generator, batch: int, length: int) -> dict[str, np.ndarray]:
    """Draws packed documents with several kinds of padding and positions that restart, and spans, in natural order."""
    segments = np.sort(rng.integers(0, rng.integers(1, 7), (batch, length), np.int32), axis=1)
    kind = rng.integers(5)
    if kind == 1:  # padding at the end of each row
        segments = np.where(np.arange(length) < rng.integers(0, length + 1, (batch, 1)), segments, -1)
    elif kind == 2 and batch > 1:  # a whole row of padding
        segments[rng.integers(batch)] = -7
    elif kind == 3:  # segments in any order, padding anywhere
        segments = rng.integers(-1, 3, (batch, length), np.int32)
    starts = np.diff(segments, axis=1, prepend=np.int32(-9)) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(length, dtype=np.int32), 0), axis=1)
    spans = np.sort(rng.integers(0, 9, (batch, length), np.int32), axis=1)
    return {
        "segment_ids": segments.astype(np.int32),
        "positions": (np.arange(length) - first).astype(np.int32),
        "span_ids": np.where(spans % 2 == 0, spans, -1).astype(np.int32),
    }


FLOATS = ("query", "key", "value", "sinks", "slopes")
Arrays = dict[str, Any]


def with_gradients(attend: Callable) -> Callable[[Arrays], tuple[Any, Arrays]]:
    """Returns a compiled function: arrays -> (out, gradients)."""

    def both(arrays: Arrays) -> tuple[Any, Arrays]:
        tokens = {name: x for name, x in arrays.items() if name not in (*FLOATS, "d_out")}
        out, pull = jax.vjp(lambda floats: attend(**floats, **tokens), {n: arrays[n] for n in FLOATS if n in arrays})
        return out, pull(arrays["d_out"])[0]

    return jax.jit(both)


@contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernel "pallas" with small tiles. Raises if the interpreter finds a race."""
    before, output = (registry.PALLAS_QUERIES, registry.PALLAS_KEYS), io.StringIO()
    registry.PALLAS_QUERIES, registry.PALLAS_KEYS = {registry.PALLAS_HEADS: (16, 8)}, 12
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)), redirect_stdout(output):
            yield
            jax.effects_barrier()
    finally:
        registry.PALLAS_QUERIES, registry.PALLAS_KEYS = before
    if "RACE DETECTED" in output.getvalue():
        raise RuntimeError(output.getvalue())


@lru_cache(maxsize=4)
def subject(program: Program) -> Callable[[Arrays], tuple[Any, Arrays]]:
    """Returns the function under test: `attention` on the program's mesh."""
    names = AXES[len(program.ring) - 1]
    axis = names if len(names) > 1 else names[0]
    sizes = program.others[0], *program.ring, program.others[1]
    kinds = (AxisType.Explicit if program.explicit else AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(sizes, ("data", *names, "tensor"), kinds, devices=jax.devices()[: math.prod(sizes)])
    spec = jax.P("data", axis, "tensor")
    options = {"layout": program.layout, "strategy": program.strategy, "axis": axis, "kernel": program.kernel}
    options |= program.logit_options
    run = with_gradients(lambda **x: attention(**x, **options, spec=None if program.explicit else spec))
    specs = {1: jax.P("tensor"), 2: jax.P("data", axis), 4: spec}

    def place_and_run(arrays: Arrays) -> tuple[Any, Arrays]:
        with jax.set_mesh(mesh), interpreted() if program.kernel == "pallas" else nullcontext():
            return run(jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, specs[x.ndim])), arrays))

    return place_and_run


@lru_cache(maxsize=4)
def oracle(program: Program) -> Callable[[Arrays], tuple[Any, Arrays]]:
    """Returns dense attention in float64."""
    run = with_gradients(lambda **x: reference_attention(**x, **program.logit_options))

    def widen_and_run(arrays: Arrays) -> tuple[Any, Arrays]:
        with jax.enable_x64(True):
            return run(jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float64), arrays))

    return widen_and_run


@jax.custom_vjp
def rounds_gradient(x: Any) -> Any:
    """Returns x, and rounds its cotangent to bfloat16, as an input of a bfloat16 product does."""
    return x


rounds_gradient.defvjp(lambda x: (x, None), lambda _, d: (d.astype(jnp.bfloat16).astype(jnp.float32),))


@lru_cache(maxsize=4)
def rival(program: Program) -> Callable[[Arrays], tuple[Any, Arrays]]:
    """Returns dense attention with bfloat16 products and float32 softmax, whose error is the yardstick for bfloat16."""
    (H, G), D, M = program.heads, program.dims[0], program.length
    options: dict[str, Any] = program.logit_options | {"scale": D**-0.5 if program.scale is None else program.scale}

    def attend(query, key, value, **rest):
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        key, value = (jnp.repeat(x, H // G, axis=2) for x in (key, value))
        logits = rounds_gradient(jnp.einsum("blhd,bmhd->blhm", query, key))
        # With the identity as key, the oracle's queries are the logits; with the identity as value, it returns weights.
        identity = jnp.broadcast_to(jnp.eye(M)[None, :, None, :], (program.batch, M, H, M))
        weights = reference_attention(logits, identity, identity, **rest, **options).astype(jnp.bfloat16)
        return jnp.einsum("blhm,bmhd->blhd", weights.astype(jnp.float32), value).astype(jnp.bfloat16)

    return with_gradients(attend)


class Measured(NamedTuple):
    """Norms of an array's difference from the exact array, of the exact array, and of the rival's error."""

    difference: float
    size: float
    rival_error: float


def measure(program: Program, arrays: Arrays) -> dict[str, Measured]:
    """Runs one case. The difference is inf for errors that are not rounding."""
    dense = dict(arrays)
    natural = np.tile(np.arange(program.length, dtype=np.int32), (program.batch, 1))
    dense.setdefault("positions", in_layout(program, natural))
    exact, actual = (flat(*run) for run in (oracle(program)(dense), subject(program)(arrays)))
    other = flat(*rival(program)(dense)) if program.dtype == "bfloat16" else exact
    result = {name: Measured(*norms(name, actual, exact), norms(name, other, exact)[0]) for name in exact}
    # A query that sees no key, or a key that no query sees, must give exactly 0.
    blind, unseen = (~exact[name].any((-2, -1)) for name in ("out", "value"))
    for name, zero in (("out", blind), ("query", blind), ("key", unseen), ("value", unseen)):
        if actual[name][zero].any():
            result[name] = result[name]._replace(difference=math.inf)
    return result


def judge(program: Program, cases: list[dict[str, Measured]]) -> dict[str, tuple[float, float]]:
    """Returns {name: (relative error, tolerance)} of the output and each gradient, over several cases of one program.

    In float32 the error is that of the worst case. Gradients of sinks and slopes (one number per head, summed over all
    tokens) can be close to 0 by chance, and so can a bfloat16 error: for these the cases are taken together.
    """
    loose = 5 if program.soft_cap is not None and "sinks" in program.extras else 1
    result = {}
    for name in cases[0]:
        difference, size, rival_error = zip(*(case[name] for case in cases), strict=True)
        together = math.hypot(*difference) / max(math.hypot(*size), 1e-30)
        worst = max(d / max(n, 1e-30) for d, n in zip(difference, size, strict=True))
        if program.dtype == "float32":
            error = together if name in ("sinks", "slopes") else worst
            result[name] = error, loose * (2e-6 if name == "out" else 2e-5)
            continue
        # At least half a bfloat16 ulp.
        yardstick = max(math.hypot(*rival_error) / max(math.hypot(*size), 1e-30), 2.0**-10)
        # Twice the yardstick; twice again for these sums, in which the rounding of the output does not average out.
        result[name] = together, (4 if name in ("sinks", "slopes") else 2) * yardstick
    return result


def flat(out: Any, gradients: Arrays) -> dict[str, np.ndarray]:
    """Returns output and gradients by name, as float64."""
    return {name: np.asarray(x).astype(np.float64) for name, x in {"out": out, **gradients}.items()}


def norms(name: str, actual: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> tuple[float, float]:
    """Returns the norm of the difference (inf if not finite) and the norm of the exact array."""
    difference = float(np.linalg.norm(actual[name] - exact[name]))
    size = float(np.linalg.norm(exact[name]))
    if name in ("query", "key"):
        # These gradients are differences of terms of the value gradient's size, which cancel where keys are few.
        size = max(size, 0.1 * float(np.linalg.norm(exact["value"])))
    return difference if math.isfinite(difference) else math.inf, size
