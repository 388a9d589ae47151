"""The kernel "cudnn": exact on simulated devices with a stand-in for cuDNN, and compiled for absent GPUs.

The stand-in replaces `Fused`, one cuDNN call, so the tests on simulated devices prove all but cuDNN itself.
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.experimental import topologies
from wire import computations

from ringattn.attn import sharded, strategies
from ringattn.attn.kernels import cudnn
from ringattn.attn.kernels.cudnn import Cudnn, check_signatures, why_never, why_not
from ringattn.attn.kernels.protocol import KV, Kernel, LogitSpec, Queries, init_partial
from ringattn.attn.kernels.registry import KernelChoice
from ringattn.attn.kernels.xla import Xla
from ringattn.attn.mask import Mask, Runs, Tokens
from ringattn.attn.reference import reference_attention
from ringattn.layout import order
from ringattn.mesh.gpu_flags import compiler_options
from ringattn.mesh.topology import arrange_devices

B, G, R, D = 2, 2, 2, 8


@dataclass(frozen=True)
class Unused:
    """A kernel that must not be called."""

    def forward(self, *args: Any) -> Any:
        """Raises."""
        raise AssertionError(why_not(*args[:4]))

    backward = forward


def without_fallback() -> Cudnn:
    """Returns the kernel, which fails if it refuses a call."""
    unused: Any = Unused()
    return Cudnn(unused)


class Dense:
    """Replaces `Fused`: dense products in `compute`, whose operands and results are rounded to the inputs' dtype."""

    compute: Any = jnp.float64

    def __init__(self, scale: float, causal: bool, window: int | None):
        self.scale, self.causal, self.window = scale, causal, window

    def forward(self, query, key, value):
        """See `Fused.forward`."""
        logits = self._logits(query, key)
        lse = jax.nn.logsumexp(logits, -1)
        probs = jnp.exp(logits - lse[..., None])
        out = jnp.einsum("bgrij,bgjd->bgrid", self._round(probs, query), value.astype(self.compute))
        return self._join(out).astype(query.dtype), self._join(lse)

    def backward(self, query, key, value, out, lse, d_out):
        """See `Fused.backward`."""
        q, o, lse, d_o = (self._split(x.astype(self.compute), key.shape[1]) for x in (query, out, lse, d_out))
        k, v = (x.astype(self.compute) for x in (key, value))
        probs = jnp.exp(self._logits(query, key) - lse[..., None])
        d_value = jnp.einsum("bgrij,bgrid->bgjd", self._round(probs, query), d_o)
        d_logits = probs * (jnp.einsum("bgrid,bgjd->bgrij", d_o, v) - (d_o * o).sum(-1, keepdims=True))
        d_logits = self.scale * self._round(d_logits, query)
        d_query = self._join(jnp.einsum("bgrij,bgjd->bgrid", d_logits, k))
        d_key = jnp.einsum("bgrij,bgrid->bgjd", d_logits, q)
        return tuple(x.astype(query.dtype) for x in (d_query, d_key, d_value))

    def _logits(self, query, key):
        q, k = self._split(query.astype(self.compute), key.shape[1]), key.astype(self.compute)
        i, j = jnp.arange(query.shape[2])[:, None], jnp.arange(key.shape[2])[None]
        seen = (j <= i) if self.causal else jnp.ones((i.size, j.size), bool)
        if self.window is not None:
            assert self.causal
            seen &= i - j <= self.window
        logits = self.scale * jnp.einsum("bgrid,bgjd->bgrij", q, k)
        return jnp.where(seen[None, None, None], logits, -jnp.inf)

    def _round(self, x, like):
        return x.astype(like.dtype).astype(self.compute)

    def _split(self, x, kv_heads):
        return rearrange(x, "B (G R) ... -> B G R ...", G=kv_heads)

    def _join(self, x):
        return rearrange(x, "B G R ... -> B (G R) ...")


@pytest.fixture
def dense(monkeypatch) -> Iterator[None]:
    """Replaces cuDNN by float64 products."""
    monkeypatch.setattr(cudnn, "Fused", Dense)
    monkeypatch.setattr(cudnn, "DTYPES", ("float64",))
    with jax.enable_x64(True):
        yield


def inputs(length: int, dtype: Any = np.float64) -> list[Any]:
    """Draws query, key, value and d_out."""
    rng = np.random.default_rng(0)
    heads = G * R, G, G, G * R
    return [jnp.asarray(rng.standard_normal((B, length, n, D)), dtype) for n in heads]


def with_gradients(f: Callable, arrays: list[Any]) -> list[np.ndarray]:
    """Returns f(query, key, value, ...) and the gradients of all arguments, for the last of `arrays` as d_out."""

    def both(*args: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(f, *args)
        return out, *pull(d_out)

    *args, d_out = arrays
    return [np.asarray(x, np.float64) for x in jax.jit(both)(*args, d_out=d_out)]


def compute(
    mesh: jax.sharding.Mesh,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    arrays: list[Any],
    segment_ids: np.ndarray | None = None,
    **options: Any,
) -> list[np.ndarray]:
    """Returns output and gradients of `shard_attention` with this kernel. `arrays` are in natural order."""
    monkeypatch.setattr(strategies, "choose_kernel", lambda *_, **__: KernelChoice("cudnn", kernel, ()))
    axes = tuple(name for name in mesh.axis_names if name.startswith("context") and mesh.shape[name] > 1)
    axis = axes[0] if len(axes) == 1 else axes or "context"
    to_layout = order(options.get("layout", "contiguous"), arrays[0].shape[1], math.prod(mesh.shape.values()))

    def local(query, key, value, extra):
        return sharded.shard_attention(query, key, value, axis=axis, **extra, **options)

    def f(query, key, value, *sinks):
        shards, extra, extra_specs = jax.P(None, axis), {}, {}
        query, key, value = (jax.reshard(x[:, to_layout], shards) for x in (query, key, value))
        if sinks:
            extra["sinks"], extra_specs["sinks"] = sinks[0], jax.P()
        if segment_ids is not None:
            extra["segment_ids"] = jax.reshard(jnp.asarray(segment_ids[:, to_layout]), shards)
            extra_specs["segment_ids"] = shards
        specs = shards, shards, shards, extra_specs
        out = jax.shard_map(local, in_specs=specs, out_specs=shards)(query, key, value, extra)
        return jax.reshard(out, jax.P())[:, np.argsort(to_layout)]

    with jax.set_mesh(mesh):
        return with_gradients(f, [jax.device_put(x, jax.P()) for x in arrays])


def assert_equal(actual: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-12) -> None:
    """Compares output and gradients."""
    for a, b in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * (1.0 + np.linalg.norm(b))


def local_length(layout: str) -> int:
    """Returns an odd number of tokens per run: per shard, or per half of a zigzag shard."""
    return 6 if layout == "zigzag" else 5


@pytest.mark.parametrize(
    ("layout", "members", "causal"),
    [
        *[(layout, members, True) for layout in ("contiguous", "striped", "zigzag") for members in (2, 4)],
        ("contiguous", 1, True),
        ("zigzag", 1, True),
        ("zigzag", 8, True),
        ("contiguous", 1, False),
        ("zigzag", 4, False),
    ],
)
def test_ring(make_mesh, dense, monkeypatch, layout, members, causal):
    """Every hop is served, and the ring is exact, with sinks and an odd number of tokens per run."""
    mask = Mask(causal=causal)
    *arrays, d_out = inputs(local_length(layout) * members)
    arrays = [*arrays, jnp.linspace(-1.0, 1.0, G * R, dtype=jnp.float64), d_out]
    actual = compute(make_mesh(context=members), without_fallback(), monkeypatch, arrays, layout=layout, mask=mask)

    def oracle(query, key, value, sinks):
        return reference_attention(query, key, value, mask=mask, sinks=sinks)

    assert_equal(actual, with_gradients(oracle, arrays))


@pytest.mark.parametrize(
    ("strategy", "layout", "outer"),
    [
        *[("gather", layout, 1) for layout in ("contiguous", "striped", "zigzag")],
        *[("ring", layout, 2) for layout in ("contiguous", "striped", "zigzag")],  # nested
        ("ulysses", "contiguous", 1),
        ("usp", "contiguous", 2),
    ],
)
def test_strategies(make_mesh, dense, monkeypatch, strategy, layout, outer):
    """The other strategies are served and exact."""
    inner = 4 if strategy == "gather" else 2
    mesh, arrays = make_mesh(context=inner, context_outer=outer), inputs(local_length(layout) * inner * outer)
    actual = compute(mesh, without_fallback(), monkeypatch, arrays, layout=layout, strategy=strategy)
    assert_equal(actual, with_gradients(reference_attention, arrays))


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_large_logits(make_mesh, dense, monkeypatch, layout):
    """The probabilities of discarded products overflow, and do not leak."""
    arrays = inputs(4 * local_length(layout))
    actual = compute(make_mesh(context=4), without_fallback(), monkeypatch, arrays, layout=layout, scale=1000.0)
    # Such logits amplify rounding.
    assert_equal(actual, with_gradients(partial(reference_attention, scale=1000.0), arrays), 1e-7)


def dense_bfloat16(query: Any, key: Any, value: Any) -> Any:
    """Returns causal attention with bfloat16 products and float32 softmax."""
    key, value = (jnp.repeat(x, R, 2) for x in (key, value))
    logits = D**-0.5 * jnp.einsum("blhd,bmhd->bhlm", query, key, preferred_element_type=jnp.float32)
    i = jnp.arange(query.shape[1])
    logits = jnp.where((i[:, None] >= i[None])[None, None], logits, -jnp.inf)
    return jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(logits).astype(query.dtype), value)


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_rounding(make_mesh, monkeypatch, layout):
    """Results rounded to bfloat16 in each of 8 hops have at most twice the error of dense bfloat16 attention."""
    monkeypatch.setattr(cudnn, "Fused", Dense)
    monkeypatch.setattr(Dense, "compute", jnp.float32)
    arrays = inputs(256, jnp.bfloat16)
    with jax.enable_x64(True):
        exact = with_gradients(reference_attention, [jnp.asarray(np.asarray(x, np.float64)) for x in arrays])
    actual = compute(make_mesh(context=8), without_fallback(), monkeypatch, arrays, layout=layout)
    for a, b, c in zip(actual, with_gradients(dense_bfloat16, arrays), exact, strict=True):
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c)


@pytest.mark.parametrize(("members", "strategy"), [(1, "ring"), (2, "ulysses")])
@pytest.mark.parametrize("left", [0, 3, 100])
def test_window(make_mesh, dense, monkeypatch, left, members, strategy):
    """A causal window is served where a device holds the whole sequence."""
    mask, arrays = Mask(window=(left, 2)), inputs(10)
    actual = compute(make_mesh(context=members), without_fallback(), monkeypatch, arrays, mask=mask, strategy=strategy)
    assert_equal(actual, with_gradients(partial(reference_attention, mask=mask), arrays))


@pytest.mark.parametrize(("layout", "refused"), [("contiguous", "window"), ("zigzag", "segment_ids")])
def test_fallback(make_mesh, dense, monkeypatch, layout, refused):
    """Calls that are refused go to the other kernel, forward and backward."""
    segments = np.sort(np.random.default_rng(0).integers(0, 3, (B, 24)), 1).astype(np.int32)
    options: dict[str, Any] = {"mask": Mask(window=5)} if refused == "window" else {"segment_ids": segments}
    arrays = inputs(24, np.float32)
    actual = compute(make_mesh(context=4), Cudnn(Xla((4, 4))), monkeypatch, arrays, layout=layout, **options)
    assert_equal(actual, with_gradients(partial(reference_attention, **options), arrays), 2e-5)


def call(
    mask: Mask = Mask(), dtype: str = "bfloat16", dims: tuple[int, int] = (D, D), length: int = 8, **tokens: Any
) -> tuple[LogitSpec, Queries, KV, None]:
    """Returns a call of a kernel with 8 keys. `tokens` replaces fields of all tokens, `keys` those of the keys."""
    of_keys: dict[str, Any] = {"runs": Runs(8, 1, "local")} | tokens.pop("keys", {}) | tokens
    positions, q_positions = (jnp.arange(n, dtype=jnp.int32)[None] for n in (8, length))
    of_queries: dict[str, Any] = {"runs": Runs(8, 1)} | tokens
    query = jnp.zeros((B, G, R, length, dims[0]), dtype)
    key, value = (jnp.zeros((B, G, 8, n), dtype) for n in dims)
    return (
        LogitSpec(mask, 1.0),
        Queries(query, Tokens(q_positions, **of_queries)),
        KV(key, value, Tokens(positions, **of_keys)),
        None,
    )


IDS = np.zeros((B, 8), np.int32)
REFUSALS = {
    "value dim": (call(dims=(16, 8)), "head dim of the keys, 16, and value has 8"),
    "chunk": (call(Mask(chunk=4)), "takes no mask with chunk=4"),
    "bidirectional window": (call(Mask(causal=False, window=3)), "takes window=3 only with causal=True"),
    "window of a remote shard": (call(Mask(window=3), keys={"runs": Runs(8, 1, "remote")}), "takes window=3 only if"),
    "window of half a shard": (call(Mask(window=3), length=16, runs=Runs(16, 1, "local", 8)), "takes window=3 only if"),
    "striped window": (
        call(Mask(window=3), runs=Runs(8, 2, "local")),
        "takes window=3 only if",
    ),
    "segments": (call(segments=IDS), "takes no segment_ids"),
    "segments, not causal": (call(Mask(causal=False), segments=IDS), "takes no segment_ids"),
    "spans": (call(spans=IDS), "takes no span_ids"),
    "spans, not causal": (call(Mask(causal=False), spans=IDS), None),
    "positions": (call(runs=None), "only with the positions that the layout implies"),
    "positions, not causal": (call(Mask(causal=False), runs=None), None),
    "several shards": (call(runs=Runs(2, 1, "local")), "several shards per device only with layout='contiguous'"),
    "several stripes": (call(runs=Runs(4, 2, "local")), "several shards per device only with layout='contiguous'"),
    "more keys than queries": (call(keys={"runs": Runs(8, 1)}), "only with as many keys as queries"),
    "nothing": (call(), None),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    """Each refusal gives its reason."""
    args, reason = REFUSALS[case]
    found = why_not(*args)
    assert (found is None) if reason is None else (reason in found)


def test_more_refusals(monkeypatch):
    """Refuses logits that are more than a product, old GPUs, other devices and a changed JAX."""
    spec, queries, kv, _ = call()
    assert why_not(replace(spec, soft_cap=2.0), queries, kv, None) == "takes no soft_cap"
    assert why_not(spec, queries, kv, jnp.ones((G, R))) == "takes no slopes"
    old = "Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1080", "NVIDIA T1000"
    for device_kind in ("cpu", "TPU v5 lite", *old, "NVIDIA TITAN V", "Quadro P6000", "AMD Instinct MI300X"):
        reason = why_never(64, "bfloat16", device_kind)
        assert reason is not None
        assert reason.endswith(f"8.0 or newer, and this device is {device_kind}")
    for device_kind in (
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA L4",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA B200",
        "NVIDIA RTX A6000",
    ):
        assert why_never(64, "bfloat16", device_kind) is None
    h100 = "NVIDIA H100 80GB HBM3"
    assert why_never(64, "bfloat16", h100) is None
    assert "the inputs are float32" in str(why_never(64, "float32", h100))
    for head_dim in (4, 132, 256):
        assert f"the inputs have {head_dim}" in str(why_never(head_dim, "bfloat16", h100))
    monkeypatch.setattr(cudnn, "SIGNATURE_REFUSAL", "changed")
    assert why_never(64, "bfloat16", h100) == "changed"


def test_without_a_fallback_a_refusal_is_an_error():
    spec, queries, kv, slopes = call()
    with pytest.raises(ValueError, match="kernel='cudnn' takes no soft_cap; use kernel='auto'"):
        Cudnn(None).forward(replace(spec, soft_cap=2.0), queries, kv, slopes, init_partial(queries, kv, slopes))


def test_signatures():
    """The installed JAX is known. A JAX with other parameters, or without the functions, is refused, not called."""
    assert check_signatures(cudnn.private) is None
    changed = SimpleNamespace(**vars(cudnn.private))
    changed._dot_product_attention_fwd = lambda query, key, value: None
    for module in (changed, SimpleNamespace(), None):
        reason = check_signatures(module)
        assert reason is not None
        assert f"jax {jax.__version__} has changed" in reason


H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's GpuTargetConfig of an H100, as protobuf text."""


@pytest.fixture(scope="module")
def h100_ring() -> jax.sharding.Mesh:
    """Returns 8 H100 that exist only for the compiler."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        pytest.skip("pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-nvcc")
    root = Path(next(iter(importlib.import_module("nvidia").__path__)))
    tools = [str(path.parent) for path in root.glob("**/bin/ptxas")]
    os.environ["PATH"] = os.pathsep.join([*tools, os.environ["PATH"]])
    xla_bridge = importlib.import_module("jax._src.xla_bridge")
    if "cuda" not in xla_bridge._backend_factories:
        xla_bridge.discover_pjrt_plugins()  # JAX has not started them on the platform "cpu"
    chips = topologies.get_topology_desc(platform="cuda", topology="1x8x1", target_config=H100).devices
    return arrange_devices({"data": 1, "context": 8, "tensor": 1}, chips)


def fused_calls(hlo: str, name: str) -> int:
    """Counts the runs of the custom call `name` in a compiled program, with every loop iteration."""
    bodies = computations(hlo)

    def count(body: str) -> int:
        total = 0
        for line in bodies[body]:
            total += f'custom_call_target="{name}"' in line
            for inner in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                trip_count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                total += count(inner) * (int(trip_count[1]) if trip_count else 1)
        return total

    return count("ENTRY")


def exposed_permutes(hlo: str) -> list[str]:
    """Returns the permutes that are synchronous, or span no fused call between their start and their done."""
    found = []
    for body in computations(hlo).values():
        started: dict[str, int] = {}
        calls = 0
        for line in body:
            calls += 'custom_call_target="__cudnn$fmha' in line
            permute = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .* collective-permute(-start|-done)?\(%?([\w.\-]*)", line)
            if permute is None:
                continue
            if permute[2] == "-start":
                started[permute[1]] = calls
            elif permute[2] is None or started.pop(permute[3]) == calls:
                found.append(line.strip()[:100])
    return found


def compile_both(mesh: jax.sharding.Mesh, **options: Any) -> str:
    """Returns the scheduled HLO of output and gradients: 8,192 local tokens, 32 query heads on 8 K/V heads of 128."""
    shards = jax.P(None, "context")
    length, sharding = 8192 * mesh.size, jax.NamedSharding(mesh, shards)
    query, key = (jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16, sharding=sharding) for n in (32, 8))

    def run(query, key, value, d_out):
        local = partial(sharded.shard_attention, **options)
        out, pull = jax.vjp(jax.shard_map(local, in_specs=(shards,) * 3, out_specs=shards), query, key, value)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        flags: Any = compiler_options()
        hlo: Any = jax.jit(run).lower(query, key, key, query).compile(compiler_options=flags).as_text()
    return hlo


@pytest.mark.parametrize(
    ("layout", "causal", "forward", "backward"),
    [
        ("contiguous", True, 1 + 7, 3 + 7),
        ("striped", True, 1 + 7, 3 + 7),
        ("zigzag", True, 1 + 2 * 7, 3 + 2 * 7),
        ("zigzag", False, 1 + 7, 2 + 7),
    ],
)
def test_compiled(h100_ring, optimized, monkeypatch, layout, causal, forward, backward):
    """Every hop is a fixed number of fused calls, without waits for the host, and hides its permutes."""
    monkeypatch.setattr(strategies, "choose_kernel", lambda *_, **__: KernelChoice("cudnn", without_fallback(), ()))
    hlo = compile_both(h100_ring, layout=layout, mask=Mask(causal=causal))
    assert fused_calls(hlo, "__cudnn$fmhaSoftmax") == forward
    assert fused_calls(hlo, "__cudnn$fmhaSoftmaxBackward") == backward
    loops = [line for line in hlo.splitlines() if " while(" in line]
    assert len(loops) == 2  # hops, forward and backward
    assert all("known_trip_count" in line for line in loops)
    assert " conditional(" not in hlo
    assert hlo.count(" collective-permute-start(") == 16
    assert not exposed_permutes(hlo)


def test_compiled_window(h100_ring, optimized, monkeypatch):
    """Tells cuDNN the number of visible keys, which includes the query's own."""
    monkeypatch.setattr(strategies, "choose_kernel", lambda *_, **__: KernelChoice("cudnn", without_fallback(), ()))
    one = arrange_devices({"data": 1, "context": 1, "tensor": 1}, h100_ring.devices.reshape(-1)[:1].tolist())
    calls = [line for line in compile_both(one, mask=Mask(window=99)).splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    assert all('"sliding_window_length": 100' in line and '"mask_type": "CAUSAL"' in line for line in calls)
