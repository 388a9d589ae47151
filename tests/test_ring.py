"""The transfers of the ring. test_equivalence.py tests its results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from wire import executed, permuted, transfers

from ringattn import Mask, attention

H, G, D = 8, 2, 16


Program = tuple[Callable, tuple[Any, ...]]


def program(
    mesh: jax.sharding.Mesh, local: int, dtype: str = "bfloat16", ids: tuple[str, ...] = (), **options: Any
) -> Program:
    """Returns attention over a sequence sharded over `mesh`, and its arguments as abstract arrays."""
    names = tuple(name for name in mesh.axis_names if name.startswith("context"))
    length = local * mesh.size

    def array(*shape: int, dtype=dtype) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, jax.P(None, names[0] if len(names) == 1 else names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arrays = array(1, length, H, D), array(1, length, G, D), array(1, length, G, D)
    tokens = {name: array(1, length, dtype=jnp.int32) for name in ids}
    options = {"axis": names[0] if len(names) == 1 else names} | options
    return lambda query, key, value, tokens: attention(query, key, value, **tokens, **options), (*arrays, tokens)


def gradient(f: Callable) -> Callable:
    """Returns the gradient of the sum of f with respect to query, key and value."""
    return jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), (0, 1, 2))


def unit(local: int, dtype: str = "bfloat16") -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of a K (or V) shard. Its heads are not repeated."""
    return (1, G, local, D), dtype


@pytest.mark.parametrize("members", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_wire(make_mesh, layout, members):
    """Sends 2(p-1) units forward; backward 2(p-1) for K/V and 4(p-1) for dK/dV in float32."""
    with jax.set_mesh(mesh := make_mesh(context=members)):
        f, args = program(mesh, 16, layout=layout)
        hops = members - 1
        forward = {unit(16): 2 * hops} if hops else {}
        assert permuted(f, *args) == forward
        both = {unit(16): 4 * hops, unit(16, "float32"): 2 * hops} if hops else {}
        assert permuted(gradient(f), *args) == both
        assert {transfer.primitive for transfer in transfers(gradient(f), *args)} <= {"ppermute"}
        units = sum(transfer.total_bytes for transfer in transfers(gradient(f), *args)) / (G * 16 * D * 2)
        assert units == 2 * hops + (2 + 4) * hops


@pytest.mark.parametrize(("ids", "id_arrays"), [(("segment_ids",), 1), (("segment_ids", "span_ids", "positions"), 3)])
def test_ids_are_sent_once_per_hop_in_int32(make_mesh, ids, id_arrays):
    with jax.set_mesh(mesh := make_mesh(context=4)):
        f, args = program(mesh, 16, ids=ids)
        assert permuted(f, *args) == {unit(16): 6, ((1, 16), "int32"): 3 * id_arrays}


@pytest.mark.parametrize(
    ("mask", "hops"),
    [
        (Mask(window=1000), 2),
        (Mask(window=(512, 0)), 1),
        (Mask(window=(513, 0)), 2),
        (Mask(window=(0, 0)), 0),
        (Mask(causal=False, window=1000), 4),
        (Mask(causal=False, window=(0, 600)), 2),
        (Mask(chunk=1024), 1),
    ],
    ids=str,
)
def test_hops_without_visible_keys_are_not_sent(make_mesh, mask, hops):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 512, mask=mask)
        assert permuted(f, *args).get(unit(512), 0) == 2 * hops
        sent = permuted(gradient(f), *args)
        assert sent.get(unit(512), 0) == 4 * hops
        assert sent.get(unit(512, "float32"), 0) == 2 * hops


def test_spans_reach_ahead_within_the_window(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 32, mask=Mask(window=(16, 64)), ids=("span_ids",))
        assert permuted(f, *args)[unit(32)] == 2 * (1 + 2)
        f, args = program(mesh, 32, mask=Mask(window=(16, 64)))
        assert permuted(f, *args)[unit(32)] == 2 * 1


def test_given_positions_need_all_hops(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 32, mask=Mask(window=16), ids=("positions",))
        assert permuted(f, *args)[unit(32)] == 2 * 7


def nested_mesh(outer: int, inner: int) -> jax.sharding.Mesh:
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh((outer, inner), ("context_outer", "context"), explicit, devices=jax.devices()[: outer * inner])


def test_a_nested_ring_uses_the_outer_axis_once_per_turn_of_the_inner_ring():
    with jax.set_mesh(mesh := nested_mesh(2, 4)):
        f, args = program(mesh, 16)
        # One hop on the outer ring. Three hops on the inner ring for each of the two shards of the outer ring.
        assert permuted(f, *args)[unit(16)] == 2 * (1 + 2 * 3)


def test_hops_of_usp_send_only_the_local_heads():
    with jax.set_mesh(mesh := nested_mesh(4, 2)):
        f, args = program(mesh, 16, strategy="usp")
        assert permuted(f, *args) == {((1, G // 2, 32, D), "bfloat16"): 2 * 3}


def test_compiled_forward_makes_seven_hops_without_an_all_gather(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 32, dtype="float32", layout="zigzag")
        hlo = str(jax.jit(f).lower(*args).compile().as_text())
    assert executed(hlo, "collective-permute") == 2 * 7
    assert not executed(hlo, "all-gather")
    assert not executed(hlo, "all-to-all")


def test_a_checkpointed_layer_rotates_kv_twice(make_mesh):
    """A policy that saves attention's output and lse avoids a third rotation for recomputation."""
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    with jax.set_mesh(mesh := make_mesh(context=4)):
        f, args = program(mesh, 16)

        def layer(query, key, value, tokens):
            return jnp.sin(f(jnp.sin(query), jnp.sin(key), value, tokens))

        assert permuted(gradient(jax.checkpoint(layer, policy=policy)), *args)[unit(16)] == 2 * 2 * 3
        assert permuted(gradient(jax.checkpoint(layer)), *args)[unit(16)] == 3 * 2 * 3
