"""What the ring sends, and how often. That its results are right, test_equivalence shows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire import executed, permuted, transfers

from ringattn import Mask, attention
from ringattn.attention.ring import plan_hops

H, G, D = 8, 2, 16


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n - 1) if n > 1 else st.nothing()))
    )
)
def test_the_runs_reach_all_that_is_needed_in_the_fewest_hops(case):
    members, needed = case
    runs = plan_hops(needed, members)
    reached = [step * hop % members for step, hops in runs for hop in range(1, hops + 1)]
    assert needed <= set(reached)
    assert len(reached) == len(set(reached))
    assert 0 not in reached
    both_ways = [
        ahead + back
        for ahead in range(members)
        for back in range(members - ahead)
        if needed <= set(range(1, ahead + 1)) | set(range(members - back, members))
    ]
    assert len(reached) == min(both_ways)


@pytest.mark.parametrize(
    ("needed", "runs"),
    [
        (range(1, 8), ((1, 7),)),
        ((), ()),
        ((1, 2), ((1, 2),)),
        ((6, 7), ((-1, 2),)),
        ((1, 2, 7), ((1, 2), (-1, 1))),
    ],
)
def test_runs_by_example(needed, runs):
    assert plan_hops(needed, 8) == runs


Program = tuple[Callable, tuple[Any, ...]]


def program(
    mesh: jax.sharding.Mesh, local: int, dtype: str = "bfloat16", ids: tuple[str, ...] = (), **how: Any
) -> Program:
    """Attention of one row spread over `mesh`, and its arguments: abstract arrays."""
    names = tuple(name for name in mesh.axis_names if name.startswith("context"))
    length = local * mesh.size

    def array(*shape: int, dtype=dtype) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, jax.P(None, names[0] if len(names) == 1 else names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arrays = array(1, length, H, D), array(1, length, G, D), array(1, length, G, D)
    tokens = {name: array(1, length, dtype=jnp.int32) for name in ids}
    how = {"axis": names[0] if len(names) == 1 else names} | how
    return lambda query, key, value, tokens: attention(query, key, value, **tokens, **how), (*arrays, tokens)


def gradient(f: Callable) -> Callable:
    """The gradient of f's sum by query, key and value."""
    return jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), (0, 1, 2))


def unit(local: int, dtype: str = "bfloat16") -> tuple[tuple[int, ...], str]:
    """Shape and type of one device's K (or V): its heads are not repeated."""
    return (1, G, local, D), dtype


@pytest.mark.parametrize("members", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_wire(make_mesh, layout, members):
    """2(p-1) units forward; backward as many again, and 4(p-1), in float32, for dK and dV. Nothing else."""
    with jax.set_mesh(mesh := make_mesh(context=members)):
        f, args = program(mesh, 16, layout=layout)
        hops = members - 1
        forward = {unit(16): 2 * hops} if hops else {}
        assert permuted(f, *args) == forward
        there_and_back = {unit(16): 4 * hops, unit(16, "float32"): 2 * hops} if hops else {}
        assert permuted(gradient(f), *args) == there_and_back
        assert {each.primitive for each in transfers(gradient(f), *args)} <= {"ppermute"}
        units = sum(each.total_bytes for each in transfers(gradient(f), *args)) / (G * 16 * D * 2)
        assert units == 2 * hops + (2 + 4) * hops


@pytest.mark.parametrize(("ids", "metadata"), [(("segment_ids",), 1), (("segment_ids", "span_ids", "positions"), 3)])
def test_ids_travel_once_a_hop_in_int32(make_mesh, ids, metadata):
    with jax.set_mesh(mesh := make_mesh(context=4)):
        f, args = program(mesh, 16, ids=ids)
        assert permuted(f, *args) == {unit(16): 6, ((1, 16), "int32"): 3 * metadata}


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
def test_hops_on_which_nobody_sees_anything_are_not_made(make_mesh, mask, hops):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 512, mask=mask)
        assert permuted(f, *args).get(unit(512), 0) == 2 * hops
        sent = permuted(gradient(f), *args)
        assert sent.get(unit(512), 0) == 4 * hops
        assert sent.get(unit(512, "float32"), 0) == 2 * hops


def test_spans_reach_ahead_as_far_as_the_window_lets_them(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 32, mask=Mask(window=(16, 64)), ids=("span_ids",))
        assert permuted(f, *args)[unit(32)] == 2 * (1 + 2)
        f, args = program(mesh, 32, mask=Mask(window=(16, 64)))
        assert permuted(f, *args)[unit(32)] == 2 * 1


def test_given_positions_may_lie_anywhere_so_that_all_hops_are_made(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 32, mask=Mask(window=16), ids=("positions",))
        assert permuted(f, *args)[unit(32)] == 2 * 7


def nested_mesh(outer: int, inner: int) -> jax.sharding.Mesh:
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh((outer, inner), ("context_outer", "context"), explicit, devices=jax.devices()[: outer * inner])


def test_a_nested_ring_uses_the_outer_axis_once_per_inner_turn():
    with jax.set_mesh(mesh := nested_mesh(2, 4)):
        f, args = program(mesh, 16)
        # Outer: one hop. Inner: three hops for each of two visitors of the outer axis.
        assert permuted(f, *args)[unit(16)] == 2 * (1 + 2 * 3)


def test_no_hop_of_usp_sends_more_than_its_part_of_the_heads():
    with jax.set_mesh(mesh := nested_mesh(4, 2)):
        f, args = program(mesh, 16, strategy="usp")
        assert permuted(f, *args) == {((1, G // 2, 32, D), "bfloat16"): 2 * 3}


def test_compiled_forward_makes_seven_hops_and_gathers_nothing(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        f, args = program(mesh, 32, dtype="float32", layout="zigzag")
        hlo = str(jax.jit(f).lower(*args).compile().as_text())
    assert executed(hlo, "collective-permute") == 2 * 7
    assert not executed(hlo, "all-gather")
    assert not executed(hlo, "all-to-all")


def test_a_checkpointed_layer_turns_its_kv_twice_and_not_three_times(make_mesh):
    """Under a policy that saves attention's output and lse, nothing of the ring is done again."""
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    with jax.set_mesh(mesh := make_mesh(context=4)):
        f, args = program(mesh, 16)

        def layer(query, key, value, tokens):
            return jnp.sin(f(jnp.sin(query), jnp.sin(key), value, tokens))

        assert permuted(gradient(jax.checkpoint(layer, policy=policy)), *args)[unit(16)] == 2 * 2 * 3
        assert permuted(gradient(jax.checkpoint(layer)), *args)[unit(16)] == 3 * 2 * 3
