"""The public function: the meshes and transformations it runs in. Refused arguments: test_checks.py."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ringattn import Mask, attention, permute, shard_attention
from ringattn.attn.kernels.xla import Xla
from ringattn.attn.reference import reference_attention

B, L, H, G, D = 2, 64, 4, 2, 8


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, L, H, D), "key": (B, L, G, D), "value": (B, L, G, D)}
    floats: dict[str, Any] = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }
    return floats | {"segment_ids": jnp.asarray(np.sort(rng.integers(-1, 3, (B, L)), axis=1), jnp.int32)}


def place(mesh: jax.sharding.Mesh, x: dict[str, Any], spec: jax.P, layout: str = "contiguous") -> dict[str, Any]:
    """Puts all arrays into `layout`, and shards them over the mesh by `spec` of [B, L, heads, D]."""
    specs = {1: jax.P(*spec[2:3]), 2: jax.P(*spec[:2]), 4: spec}
    permuted = {n: permute(v, layout, mesh.shape["context"]) for n, v in x.items() if v.ndim > 1}
    return {n: jax.device_put(v, jax.NamedSharding(mesh, specs[v.ndim])) for n, v in {**x, **permuted}.items()}


def assert_exact(out: Any, x: dict[str, Any], layout: str = "contiguous", shards: int = 1, **options: Any) -> None:
    """Compares out, in `layout`, with dense attention in float64."""
    with jax.enable_x64(True):
        wide = {n: np.asarray(v, np.float64) if v.dtype == jnp.float32 else v for n, v in x.items()}
        exact = np.asarray(reference_attention(**{n: jnp.asarray(v) for n, v in wide.items()}, **options))
    exact = permute(exact, layout, shards)
    assert out.dtype == jnp.float32
    assert np.linalg.norm(out - exact) <= 2e-6 * np.linalg.norm(exact)


def mesh_of(kind: AxisType, data: int = 1, context: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * context * tensor]
    return jax.make_mesh((data, context, tensor), ("data", "context", "tensor"), (kind,) * 3, devices=devices)


SPEC = jax.P(None, "context")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_batch_sequence_and_heads_all_sharded(kind, run):
    mesh, spec = mesh_of(kind, 2, 2, 2), jax.P("data", "context", "tensor")
    x = arrays() | {"sinks": jnp.arange(float(H)), "slopes": 2.0 ** -jnp.arange(1.0, 5.0)}
    with jax.set_mesh(mesh):
        placed = place(mesh, x, spec, "zigzag") | {"slopes": x["slopes"]}  # sharded sinks, replicated slopes
        options: dict[str, Any] = {} if kind == AxisType.Explicit else {"spec": spec}
        out = run(lambda x: attention(**x, layout="zigzag", **options))(placed)
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 4)
    assert_exact(out, x, "zigzag", 2)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_ids_may_be_replicated(kind):
    x = arrays()
    with jax.set_mesh(mesh := mesh_of(kind, context=4)):
        placed = place(mesh, x, SPEC)
        replicated = jax.device_put(x["segment_ids"], jax.NamedSharding(mesh, jax.P()))
        out = attention(**placed | {"segment_ids": replicated})
    assert_exact(out, x)


def test_the_default_spec_on_an_auto_mesh_shards_only_the_sequence():
    x = arrays()
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto, context=8)):
        out = attention(**place(mesh, x, SPEC))
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, SPEC), 4)
    assert_exact(out, x)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_future_tokens_have_zero_gradient(make_mesh, strategy):
    x = arrays()
    del x["segment_ids"]
    at = 37
    with jax.set_mesh(mesh := make_mesh(context=2)):
        placed = place(mesh, x, SPEC, "zigzag")
        one_hot = permute(jnp.arange(L) == at, "zigzag", 2, dim=0).astype(jnp.float32)

        def loss(x):
            return (attention(**x, layout="zigzag", strategy=strategy) * one_hot[None, :, None, None]).sum()

        gradients = jax.jit(jax.grad(loss))(placed)
    order = permute(np.arange(L), "zigzag", 2, dim=0)
    for name, gradient in gradients.items():
        nonzero = np.max(abs(np.asarray(gradient)), (0, 2, 3)) > 0
        assert not nonzero[order > at].any(), name
        assert nonzero[order == at].all(), name
        assert name == "query" or nonzero[order <= at].all(), name


def test_under_vmap(make_mesh):
    rows = [arrays(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    with jax.set_mesh(mesh := make_mesh(context=4)):
        specs = jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P(None, *SPEC)), stacked)
        placed = jax.device_put(stacked, specs)
        f = jax.vmap(lambda x: attention(**x, mask=Mask(window=20)))
        out = jax.jit(f)(placed)
        gradient = jax.jit(jax.grad(lambda x, ids: jnp.sin(f(x | {"segment_ids": ids})).sum()))
        ids = placed.pop("segment_ids")
        stacked_gradient = gradient(placed, ids)
        single = jax.jit(jax.grad(lambda x, ids: jnp.sin(attention(**x, segment_ids=ids, mask=Mask(window=20))).sum()))
        for n in range(2):
            row, of_row = (jax.tree.map(lambda x, n=n: x[n], tree) for tree in (placed, stacked_gradient))
            chex.assert_trees_all_close(of_row, single(row, ids[n]), rtol=1e-7, atol=2e-6)
    for n, x in enumerate(rows):
        assert_exact(out[n], x, mask=Mask(window=20))


@pytest.mark.parametrize(
    ("strategy", "check_vma"), [("ring", True), ("ring", False), ("gather", True), ("ulysses", True)]
)
def test_shard_attention_inside_a_shard_map(make_mesh, strategy, check_vma):
    x = arrays()
    sinks = jnp.linspace(-1, 1, H)
    with jax.set_mesh(mesh := make_mesh(context=2)):
        placed = place(mesh, x, SPEC, "striped")

        def local(x, sinks):
            return shard_attention(**x, sinks=sinks, layout="striped", strategy=strategy)

        specs = {name: jax.P(*SPEC[: min(v.ndim, 2)]) for name, v in placed.items()}
        f = jax.shard_map(local, in_specs=(specs, jax.P()), out_specs=SPEC, check_vma=check_vma)
        out = jax.jit(f)(placed, sinks)
        ids = placed.pop("segment_ids")

        def loss(f: Callable) -> Callable:
            return lambda x, sinks: jnp.sin(f(x | {"segment_ids": ids}, sinks)).sum()

        gradients = jax.jit(jax.grad(loss(f), (0, 1)))(placed, sinks)
        expected = jax.jit(
            jax.grad(loss(lambda x, sinks: attention(**x, sinks=sinks, layout="striped", strategy="gather")), (0, 1))
        )(placed, sinks)
    assert_exact(out, x | {"sinks": sinks}, "striped", 2)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-7, atol=3e-6)


def test_a_sink_of_minus_infinity_changes_nothing():
    x = arrays()
    x["segment_ids"] = x["segment_ids"].at[0, :5].set(-1)
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto, context=2)):
        placed = place(mesh, x, SPEC)
        gradient = jax.grad(lambda sinks: attention(**placed, sinks=sinks).sum())(jnp.full(H, -jnp.inf))
        out = attention(**placed, sinks=jnp.full(H, -jnp.inf))
    assert_exact(out, x)
    np.testing.assert_array_equal(gradient, 0.0)


def test_float64_inputs_give_float64_accuracy():
    with jax.enable_x64(True), jax.set_mesh(mesh := mesh_of(AxisType.Auto, context=2)):
        x = arrays()
        x |= {name: x[name].astype(jnp.float64) for name in ("query", "key", "value")}
        out = attention(**place(mesh, x, SPEC, "zigzag"), layout="zigzag")
        exact = permute(reference_attention(**x), "zigzag", 2)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, exact, atol=1e-13)


def test_queries_beyond_the_keys_precede_all_keys(make_mesh):
    x = {n: v for n, v in arrays().items() if n != "segment_ids"}
    x |= {name: x[name][:, :48] for name in ("key", "value")}
    for mask in (Mask(), Mask(causal=False), Mask(window=20)):
        with jax.set_mesh(mesh := make_mesh(context=4)):
            out = attention(**place(mesh, x, SPEC), mask=mask)
        assert_exact(out, x, mask=mask)
        assert not mask.causal or not np.asarray(out)[:, :16].any()


def test_reduce_dtype_rounds_only_kv_gradients(make_mesh):
    x = {n: v for n, v in arrays().items() if n != "segment_ids"}

    def gradients(**options: Any) -> dict[str, Any]:
        run = jax.jit(jax.grad(lambda x: jnp.sin(attention(**x, **options)).sum()))
        return {name: np.asarray(gradient) for name, gradient in run(placed).items()}

    with jax.set_mesh(mesh := make_mesh(context=4)):
        placed = place(mesh, x, SPEC)
        for strategy in ("ring", "gather"):
            exact, rounded = gradients(strategy=strategy), gradients(strategy=strategy, reduce_dtype="bfloat16")
            np.testing.assert_array_equal(exact["query"], rounded["query"])
            for name in ("key", "value"):
                error = np.linalg.norm(exact[name] - rounded[name]) / np.linalg.norm(exact[name])
                assert 1e-4 < error < 1e-2, (strategy, name)


def test_attention_compiles_once_per_shape(make_mesh, monkeypatch):
    """Repeated calls of one shape trace the kernel once, and a call of another shape once more."""
    monkeypatch.setattr(Xla, "forward", chex.assert_max_traces(Xla.forward, n=1))
    mask = Mask(window=17)  # other tests use other masks, so that none of their traces is in the cache
    with jax.set_mesh(mesh := make_mesh(context=1)):
        for seed in range(3):
            attention(**place(mesh, arrays(seed), SPEC), mask=mask)
        shorter = {n: v[:, :32] for n, v in arrays().items()}
        with pytest.raises(AssertionError, match="traced"):
            attention(**place(mesh, shorter, SPEC), mask=mask)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_nan_in_padding_does_not_spread(make_mesh, strategy):
    x = arrays()
    padding = np.asarray(x["segment_ids"]) < 0
    assert padding.any()
    nan = {
        name: jnp.asarray(np.where(padding[:, :, None, None], np.nan, x[name])) for name in ("query", "key", "value")
    }
    with jax.set_mesh(mesh := make_mesh(context=2)):

        @jax.jit
        def out_and_gradient(x, ids):
            out, back = jax.vjp(lambda x: attention(**x, segment_ids=ids, strategy=strategy), x)
            return out, back(jnp.where(ids[:, :, None, None] < 0, jnp.nan, jnp.ones_like(out)))[0]

        results = []
        for inputs in (x, x | nan):
            placed = place(mesh, inputs, SPEC)
            ids = placed.pop("segment_ids")
            results.append(out_and_gradient(placed, ids))
    chex.assert_trees_all_equal(*results)
    for gradient in results[0][1].values():
        assert not np.asarray(gradient)[padding].any()
