"""The laws of the ring, checked in programs that the TPU compiler compiles without a TPU.

    pip install -e '.[test,tpu]' && pytest tests/test_laws.py

Tests that need the TPU compiler are skipped without the extra `tpu`. The sizes are those of one layer of Llama-3 8B:
8,192 local tokens, 32 query heads on 8 K/V heads of 128, bfloat16.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

# Set before the compiler starts: it would ask for host names, and lock chips that it does not use.
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from wire import exposed, permuted, transfers

from ringattn import Mask, attention, config, planning
from ringattn.attn.kernels import tiles
from ringattn.attn.kernels.protocol import KV, Queries
from ringattn.attn.kernels.registry import XLA_TILES
from ringattn.attn.mask import Tokens
from ringattn.cost.memory import program_memory
from ringattn.cost.program import Op, Program
from ringattn.layout import LAYOUTS, shard_positions
from ringattn.mesh.topology import arrange_devices
from ringattn.planning.compile import compile_step, prepare, shard_bytes
from ringattn.planning.decoding import lower_decode, plan_decode
from ringattn.planning.links import Links
from ringattn.planning.memory import device_limit, refused_bytes
from ringattn.planning.schedule import Timeline

pytestmark = pytest.mark.usefixtures("optimized")
C, H, G, D = 8192, 32, 8, 128
MIB = 2**20
TILE = XLA_TILES["cpu"]


@lru_cache
def tpu_ring(topology: str) -> jax.sharding.Mesh:
    """Returns all chips of a TPU topology as one ring, in the order of `ringattn.mesh.topology`."""
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]' for the TPU compiler")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return arrange_devices({"data": 1, "context": len(chips), "tensor": 1}, chips)


def arrays(mesh: jax.sharding.Mesh, c: int = C) -> list[jax.ShapeDtypeStruct]:
    """Query, key, value and d_out with c tokens per device, as abstract arrays."""
    sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
    length = c * mesh.shape["context"]
    return [jax.ShapeDtypeStruct((1, length, n, D), jnp.bfloat16, sharding=sharding) for n in (H, G, G, H)]


def both(options: dict[str, Any]) -> Any:
    """Returns a function that computes output and gradients of attention."""

    def run(query, key, value, d_out):
        out, pull = jax.vjp(lambda *x: attention(*x, **options), query, key, value)
        return out, pull(d_out)

    return run


@lru_cache
def compiled(topology: str, layout: str, mask: Mask = Mask()) -> Any:
    """Compiles the forward and backward pass for the topology."""
    with jax.set_mesh(mesh := tpu_ring(topology)):
        return jax.jit(both({"layout": layout, "mask": mask})).lower(*arrays(mesh)).compile()


def temporaries(topology: str, layout: str) -> float:
    """Returns the compiled temporaries in MiB per chip.

    The compiler chooses the memory layout of the arrays, as it does within a model. With the default layouts it keeps
    transposed copies of query and d_out, 128 MiB.
    """
    with jax.set_mesh(mesh := tpu_ring(topology)):
        formats = tuple(Format(Layout.AUTO, x.sharding) for x in arrays(mesh))
        jitted = jax.jit(both({"layout": layout}), in_shardings=formats, out_shardings=Format(Layout.AUTO))
        program = jitted.lower(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(mesh))).compile()
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes / MIB


@pytest.mark.parametrize("members", [4, 8])
def test_wire(make_mesh, members):
    """Units of a K shard: forward 2(p-1); backward 2(p-1) for K/V, and 4(p-1) for dK/dV, in bfloat16 2(p-1)."""
    with jax.set_mesh(mesh := make_mesh(context=members)):
        query, key, value, d_out = arrays(mesh)
        unit = C * G * D * 2

        def units(f: Any, *args: Any) -> float:
            return sum(transfer.total_bytes for transfer in transfers(f, *args)) / unit

        assert units(attention, query, key, value) == 2 * (members - 1)
        assert units(both({}), query, key, value, d_out) == (2 + 2 + 4) * (members - 1)
        assert units(both({"reduce_dtype": "bfloat16"}), query, key, value, d_out) == (2 + 2 + 2) * (members - 1)


def test_a_window_of_1000_keys_takes_two_hops_of_512(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        query, key, value, _ = arrays(mesh, 512)
        sent = permuted(lambda *x: attention(*x, mask=Mask(window=(1000, 0))), query, key, value)
    assert sent == {((1, G, 512, D), "bfloat16"): 2 * 2}


def test_memory_does_not_grow_with_the_ring():
    found = {topology: temporaries(topology, "zigzag") for topology in ("v5e:2x2", "v5e:8x8")}
    print(", ".join(f"{topology}: {size:.0f} MiB" for topology, size in found.items()))
    assert found["v5e:8x8"] <= 400
    assert found["v5e:8x8"] <= 1.05 * found["v5e:2x2"]


@pytest.mark.parametrize(
    ("topology", "layout"),
    [("v5e:2x4", "zigzag"), ("v5e:8x8", "contiguous"), ("v5p:2x2x2", "zigzag")],
)
def test_every_transfer_overlaps_with_the_attention_of_its_hop(topology, layout):
    sends, exposed_sends = exposed(compiled(topology, layout).as_text())
    # K and V: forward first send, loop; backward first send, first hop, loop. dK and dV: loop, last hop, final send.
    assert sends >= 16
    assert exposed_sends == []


@pytest.mark.parametrize(("speed", "hidden"), [(0.7, 1.0), (7.0, 0.55)])
def test_the_schedule_of_a_ring_is_exposed_if_its_compute_is_too_short(speed, hidden):
    """With the attention of a hop at so many times the peak of the chip."""
    mesh, text = tpu_ring("v5e:2x4"), compiled("v5e:2x4", "zigzag").as_text()
    pairs = C * C / 2  # of a causal hop of zigzag

    def op_seconds(computation: str, op: Op) -> float | int:
        if "tpu_custom_call" not in op.rest:
            return 0
        flops = 4 * H * D * pairs * (2.5 if "backward" in op.name else 1)
        return flops / (speed * 197e12)

    hops = Timeline(Program(text), op_seconds, Links(list(mesh.devices.flat))).collectives()
    hops = [each for each in hops if each.op == "collective-permute"]
    assert sum(each.count for each in hops if "f32" in each.array) == 2 * 7
    link = sum(each.count * (each.link_seconds or 0) for each in hops)
    found = sum(each.count * (each.link_seconds or 0) * each.hidden for each in hops) / link
    assert found == pytest.approx(hidden, abs=0.15)


def test_the_compiler_refuses_by_the_peak():
    """`peak` is the figure of the compiler's own error: here an argument, a result and as much of temporaries."""
    mesh = tpu_ring("v5e:2x2")
    limit = 15.75 * 2**30
    assert device_limit(mesh.devices.flatten().tolist()) == limit

    def compile_products(n: int) -> Any:
        x = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
        return jax.jit(lambda x: ((x @ x) @ x) @ ((x @ x.T) @ x)).lower(x).compile()

    n = 37_504
    memory = program_memory(compile_products(n))
    assert memory is not None
    assert memory.arguments == memory.results == memory.temporaries == 4 * n * n
    assert memory.peak == memory.total == 12 * n * n <= limit
    assert memory.host == 0
    assert memory.program > 0
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        compile_products(n := 37_632)
    _, needed = refused_bytes(str(refusal.value))
    assert needed == pytest.approx(12 * n * n, rel=1e-3)


def test_every_transfer_of_a_window_in_both_directions_overlaps():
    both_ways = Mask(causal=False, window=2 * C)
    sends, exposed_sends = exposed(compiled("v5e:2x4", "contiguous", both_ways).as_text())
    assert sends >= 16
    assert exposed_sends == []


def tile_products(layout: str, members: int, c: int) -> np.ndarray:
    """Returns the number of tile pairs that the kernel computes, [members, hops]."""

    @jax.jit
    def count(i: Any, j: Any) -> Any:
        x = jnp.zeros((1, 1, c, 1))
        queries, kv = Queries(x[:, :, None], Tokens(i)), KV(x, x, Tokens(j))
        return tiles.plan_tiles(Mask(), queries, kv, TILE).visit(lambda pair, n, masked: n + 1, jnp.int32(0))

    positions = [jnp.asarray(shard_positions(layout, member, members, c), jnp.int32)[None] for member in range(members)]
    return np.array([[int(count(positions[r], positions[r - hop])) for hop in range(members)] for r in range(members)])


def test_balance():
    """With causal zigzag, all devices do equal work at every hop, and half of the dense work in total."""
    c, members = 2048, 8
    products = {layout: tile_products(layout, members, c) for layout in LAYOUTS}
    dense = (c // TILE[0]) * (c // TILE[1]) * members**2
    by_hop = products["zigzag"]
    assert (by_hop.max(0) / by_hop.mean(0)).max() <= 1.01
    assert by_hop.sum() / dense <= 0.54
    assert products["contiguous"].sum() / dense <= 0.54
    assert (products["contiguous"].max(0) / products["contiguous"].mean(0)).max() > 1.5


def test_a_zigzag_hop_is_two_unmasked_products_of_halves():
    c, members, half = 2048, 8, 1024
    seen: dict[tuple[int, int], set[tuple[int, int, bool]]] = {}

    @jax.jit
    def count(i: Any, j: Any) -> Any:
        x = jnp.zeros((1, 1, c, 1))
        queries, kv = Queries(x[:, :, None], Tokens(i)), KV(x, x, Tokens(j))

        def step(pair: tiles.TilePair, counts, masked: bool):
            return counts.at[pair.first_query // half, pair.first_key // half, int(masked)].add(1)

        return tiles.plan_tiles(Mask(), queries, kv, TILE).visit(step, jnp.zeros((2, 2, 2), jnp.int32))

    def halves(member: int, hop: int) -> Iterator[tuple[int, int, bool]]:
        i, j = (
            jnp.asarray(shard_positions("zigzag", shard % members, members, c), jnp.int32)[None]
            for shard in (member, member - hop)
        )
        counts = np.asarray(count(i, j))
        all_tiles = (half // TILE[0]) * (half // TILE[1])
        assert set(counts.ravel()) <= {0, all_tiles}
        yield from ((q, k, bool(masked)) for q, k, masked in np.argwhere(counts))

    for member in range(members):
        for hop in range(1, members):
            seen[member, hop] = set(halves(member, hop))
            # The second half of the queries sees the first half of the keys; the other pair depends on the owner.
            from_earlier = member >= hop
            assert seen[member, hop] == {(1, 0, False), (0, 0, False) if from_earlier else (1, 1, False)}


@pytest.mark.parametrize(
    ("topology", "dtype", "depth"),
    [
        ("v4:2x2x1", "bfloat16", 256),
        ("v5e:2x2", "float32", 64),
        ("v5p:2x2x1", "bfloat16", 256),
        ("v6e:2x2", "bfloat16", 128),
        ("tpu7x:2x2x1", "bfloat16", 128),
    ],
)
def test_the_fused_kernel_compiles_for_every_chip(topology, dtype, depth):
    """With segments, spans, slopes and a soft cap, for the largest tiles."""
    with jax.set_mesh(mesh := tpu_ring(topology)):
        sharding, length = jax.NamedSharding(mesh, jax.P(None, "context")), 1024 * mesh.size
        shapes = [(1, length, heads, depth) for heads in (16, 4, 4, 16)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape in shapes]
        ids = np.zeros((1, length), np.int32)
        extras = {"segment_ids": ids, "span_ids": ids, "soft_cap": 30.0, "kernel": "pallas"}

        def run(*x: Any) -> Any:
            return both(extras | {"slopes": jnp.ones(16)})(*x)

        text = jax.jit(run).lower(*inputs).compile().as_text() or ""
    assert "ringattn_forward" in text
    assert "ringattn_backward" in text


CONFIGS = Path(__file__).parents[1] / "configs"


def rows_of(name: str, tokens: int) -> config.Config:
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]' for the TPU compiler")
    c = config.read(CONFIGS / f"{name}.py")
    return replace(c, data=replace(c.data, seq_len=tokens))


def activations(c: config.Config, topology: str) -> int:
    """Memory at the peak apart from state, batch and gradients. Plans no kernels, unlike `planning.plan`."""
    compiled, state, batch = compile_step(c, prepare(c, topology))
    memory = program_memory(compiled.program)  # type: ignore[arg-type]
    assert memory is not None
    return memory.peak - shard_bytes(state) - shard_bytes(batch) - shard_bytes(state.params)


def test_eight_billion_parameters_train_on_a_million_tokens_and_half_the_ring_takes_no_less_memory():
    """16,384 tokens per chip on 64 and on 32 chips. Both in one test, so that one process compiles both."""
    plan = planning.plan(rows_of("llama3_8b_1m", 2**20), "v5e:8x8")
    assert plan.refusal is None
    assert plan.parameters == 8_030_261_248
    assert plan.device_bytes.limit == 15.75 * 2**30
    assert plan.device_bytes.peak is not None
    assert plan.device_bytes.peak < 15.75 * 2**30
    hops = [each for each in plan.collectives if each.part.startswith("ring")]
    assert sum(each.count for each in hops if "bf16" in each.array) == 32 * 2 * 2 * 63  # layers, K and V, passes, hops
    assert {(each.part, each.array) for each in hops if each.hidden < 1} == set()
    assert plan.time is not None
    assert 0.5 < plan.time.utilisation < 0.85
    assert plan.device_bytes.temporaries is not None
    whole, half = plan.device_bytes.saved + plan.device_bytes.temporaries, rows_of("llama3_8b_1m", 2**19)
    assert whole < 1.05 * activations(half, "v5e:4x8")


@pytest.mark.slow
def test_eight_billion_parameters_train_on_ten_million_tokens():
    plan = planning.plan(rows_of("llama3_8b_10m", 10 * 2**20), "v5p:4x4x4")
    assert plan.refusal is None
    assert plan.device_bytes.peak is not None
    assert plan.device_bytes.peak < 95.7 * 2**30


def test_a_token_takes_at_most_half_longer_than_reading_the_cache():
    """By the compiler's cycles, without waiting for transfers: 8B, a million tokens on 64 chips."""
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]' for the TPU compiler")
    plan = plan_decode(config.read(CONFIGS / "llama3_8b_1m.py"), "v5e:8x8")
    assert plan.read_seconds is not None
    assert plan.other_seconds is not None
    assert plan.other_seconds < 0.5 * plan.read_seconds


def test_a_step_of_decoding_reads_the_cache_in_place():
    """Law 7: a new token moves no K/V, and nothing of the size of the cache is copied. Two layers of an 8B model."""
    model = replace(config.read(CONFIGS / "llama3_8b_1m.py").model, layers=2)
    found = []
    for tokens in (2**20, 2**23):
        chips = tpu_ring("v5e:2x4").devices.flatten().tolist()
        mesh = arrange_devices({"data": 1, "context_outer": 1, "context": len(chips), "tensor": 1}, chips)
        with jax.set_mesh(mesh):
            lowered, sizes = lower_decode(model, mesh, tokens)
            compiled = lowered.compile()
        assert sizes.cache == 2 * 2 * G * D * 2 * tokens // 8 + 2 * 4  # with the length of the row, and the offset
        assert compiled.memory_analysis().temp_size_in_bytes < sizes.cache / 30
        text = compiled.as_text()
        assert not re.search(r"(all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", text)
        found.append(sorted(re.findall(r"= (\S+) all-reduce(?:-start)?\(", text)))
        assert 'custom_call_target="tpu_custom_call"' in text  # the Pallas kernel
    assert found[0] == found[1]
