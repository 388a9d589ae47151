"""Attention to a sharded cache: against the definition, with the kernel for TPUs and without, moving queries or K/V."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax

from ringattn.attn import decode as module
from ringattn.attn.decode import UNUSED, chunk_attention, decode_attention, moves_queries
from ringattn.attn.kernels.protocol import CachedKV, LogitSpec
from ringattn.attn.kernels.tpu_decode import tile_slots
from ringattn.attn.mask import Mask
from ringattn.attn.reference import reference_attention

AXES = ("context_outer", "context")
LAYERS, BATCH, GROUPS, SLOTS, DIM, HEADS = 2, 2, 2, 24, 8, 4
SPECS = {
    "causal": LogitSpec(Mask(), 0.3),
    "window, cap": LogitSpec(Mask(window=(7, 0)), 0.5, 2.0),
}


def cache_of(rng: np.random.Generator, rows: int, used: int, offset: int, int8: bool = False) -> CachedKV:
    """A cache with `used` of SLOTS tokens per row, in any order; layer 1 of 2 is read."""
    shape = (LAYERS, rows, GROUPS, SLOTS, DIM)
    key, value = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    scales: list[jax.Array | None] = [None, None]
    if int8:
        key, value = (np.clip(np.round(40 * x), -127, 127).astype(np.int8) for x in (key, value))
        scales = [jnp.asarray(rng.uniform(0.01, 0.04, shape[:-1]), jnp.bfloat16) for _ in range(2)]
    positions = np.stack(
        [rng.permutation(np.where(np.arange(SLOTS) < used, offset + np.arange(SLOTS), UNUSED)) for _ in range(rows)]
    )
    in_use = np.full(rows, SLOTS)
    return CachedKV(
        *map(jnp.asarray, (key, value)), *scales, *(jnp.asarray(x, jnp.int32) for x in (positions, in_use, 1))
    )  # type: ignore[arg-type]


def dense(part: CachedKV) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values [B, S, G, D] of layer 1, and positions, of all rows."""
    found = []
    for x, scale in ((part.key, part.key_scale), (part.value, part.value_scale)):
        values = np.asarray(x[1], np.float64) * (1 if scale is None else np.asarray(scale[1], np.float64)[..., None])
        found.append(np.moveaxis(np.broadcast_to(values, (BATCH, *values.shape[1:])), 1, 2))
    return *found, np.broadcast_to(np.asarray(part.positions), (BATCH, SLOTS))  # type: ignore[return-value]


def expected(spec: LogitSpec, query: np.ndarray, positions: np.ndarray, parts: list[CachedKV]) -> np.ndarray:
    key, value, kv_positions = (np.concatenate(each, 1) for each in zip(*map(dense, parts), strict=True))
    ids = jnp.asarray(positions), jnp.asarray(kv_positions)
    options = {"mask": spec.mask, "scale": spec.scale, "soft_cap": spec.soft_cap, "positions": ids}
    return np.asarray(reference_attention(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), **options))


def specs_of(part: CachedKV) -> CachedKV:
    data = None if part.key.shape[1] == 1 else "data"
    stack, scale = P(None, data, "tensor", AXES, None), P(None, data, "tensor", AXES)
    scales = (None, None) if part.key_scale is None else (scale, scale)
    return CachedKV(stack, stack, *scales, P(data, AXES), P(data), P())  # type: ignore[arg-type]


def local_part(part: CachedKV) -> CachedKV:
    return part._replace(slots_in_use=jnp.minimum(part.slots_in_use, part.key.shape[3]))


def placed(mesh, specs, *arrays):
    return jax.tree.map(lambda spec, x: jax.device_put(x, jax.NamedSharding(mesh, spec)), specs, arrays)


def run_decode(mesh, spec, query, positions, parts, kernel) -> np.ndarray:
    rows = P("data", "tensor", None)

    def local(query, positions, parts):
        return decode_attention(spec, query, positions, list(map(local_part, parts)), AXES, kernel)

    in_specs = rows, P("data"), list(map(specs_of, parts))
    # The interpreter of TPU kernels does not track which values vary over the mesh.
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=rows, check_vma=kernel == "xla")
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(mapped)(*placed(mesh, in_specs, query, positions, parts)))


@pytest.mark.parametrize("kernel", ["xla", "pallas"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("int8", [False, True])
def test_a_query_per_row_sees_shared_and_own_keys(make_mesh, monkeypatch, kernel, name, int8):
    monkeypatch.setattr(module, "tile_slots", lambda slots, size: 3)  # several tiles, the last of them empty
    rng, spec = np.random.default_rng(0), SPECS[name]
    parts = [cache_of(rng, 1, 20, 0, int8), cache_of(rng, BATCH, 9, 20, int8)]
    query = rng.standard_normal((BATCH, HEADS, DIM)).astype(np.float32)
    positions = np.array([24, 29], np.int32)
    sizes = {"data": 2} if int8 else {}  # without it, the queries of both rows see the shared keys together
    out = run_decode(make_mesh(**sizes, context=2, tensor=2), spec, query, positions, parts, kernel)
    np.testing.assert_allclose(out, expected(spec, query[:, None], positions[:, None], parts)[:, 0], atol=2e-6)


def test_slots_that_are_not_in_use_are_not_read(make_mesh, monkeypatch):
    monkeypatch.setattr(module, "tile_slots", lambda slots, size: 4)
    rng, spec = np.random.default_rng(1), SPECS["causal"]
    part = cache_of(rng, BATCH, SLOTS, 0)
    part = part._replace(positions=jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), (BATCH, SLOTS)))
    query, positions = rng.standard_normal((BATCH, HEADS, DIM)).astype(np.float32), np.full(BATCH, SLOTS, np.int32)
    used = part._replace(slots_in_use=jnp.array([8, 5], jnp.int32))  # the second row needs two tiles, too
    out = run_decode(make_mesh(), spec, query, positions, [used], "pallas")
    first = part._replace(positions=jnp.where(jnp.arange(SLOTS)[None] < 8, part.positions, UNUSED))
    np.testing.assert_allclose(out, expected(spec, query[:, None], positions[:, None], [first])[:, 0], atol=2e-6)


def test_a_row_without_keys_gives_zero(make_mesh):
    rng = np.random.default_rng(2)
    part = cache_of(rng, BATCH, 0, 0)._replace(slots_in_use=jnp.zeros(BATCH, jnp.int32))
    query = rng.standard_normal((BATCH, HEADS, DIM)).astype(np.float32)
    for kernel in ("xla", "pallas"):
        out = run_decode(make_mesh(context=2), SPECS["causal"], query, np.array([3, 4], np.int32), [part], kernel)
        np.testing.assert_array_equal(out, np.zeros_like(out))


@pytest.mark.parametrize("sizes", [{"data": 2, "context": 4}, {"context_outer": 2, "context": 2}])
@pytest.mark.parametrize("queries_move", [True, False])
def test_a_chunk_sees_shared_and_own_keys(make_mesh, monkeypatch, sizes, queries_move):
    monkeypatch.setattr(module, "moves_queries", lambda *_: queries_move)
    rng, spec, length = np.random.default_rng(3), SPECS["window, cap"], 8
    parts = [cache_of(rng, 1, 20, 0, int8=True), cache_of(rng, BATCH, 9, 20)]
    query = rng.standard_normal((BATCH, length, HEADS, DIM)).astype(np.float32)
    positions = np.stack([rng.permutation([*range(21, 28), -1]) for _ in range(BATCH)]).astype(np.int32)
    tokens = P("data", AXES)

    def local(query, positions, parts):
        return chunk_attention(spec, query, positions, parts, AXES)

    in_specs = P("data", AXES, "tensor", None), tokens, list(map(specs_of, parts))
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=in_specs[0])
    with jax.set_mesh(mesh := make_mesh(**sizes)):
        out = np.asarray(jax.jit(mapped)(*placed(mesh, in_specs, query, positions, parts)))
    np.testing.assert_allclose(out, expected(spec, query, positions, parts), atol=2e-6)
    assert not out[positions < 0].any()


def test_short_chunks_move_to_a_long_cache():
    assert moves_queries(64, 65_536, 4, 2)
    assert not moves_queries(64, 256, 4, 2)
    assert not moves_queries(1024, 2**20, 4, 2)  # long enough to hide the hops of a ring


def test_tiles_divide_the_slots():
    assert tile_slots(96, 256) == 96
    assert tile_slots(163_840, 256) == 4096
    assert tile_slots(3 * 1024, 512) == 1536
    assert tile_slots(100_001, 256) is None


def test_pallas_is_chosen_on_tpus_only(make_mesh, monkeypatch):
    called = []
    monkeypatch.setattr(module, "tpu_decode", lambda *args, **_: called.append(1) or lax.stop_gradient(args))
    rng = np.random.default_rng(4)
    query = rng.standard_normal((BATCH, HEADS, DIM)).astype(np.float32)
    run_decode(make_mesh(), SPECS["causal"], query, np.zeros(BATCH, np.int32), [cache_of(rng, BATCH, 4, 0)], "auto")
    assert not called
