"""The public function: where it runs, and what it refuses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ringattn import Mask, attention, permute, shard_attention
from ringattn.attention.dense import dense_attention

B, L, H, G, D = 2, 64, 4, 2, 8


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, L, H, D), "key": (B, L, G, D), "value": (B, L, G, D)}
    floats: dict[str, Any] = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }
    return floats | {"segment_ids": jnp.asarray(np.sort(rng.integers(-1, 3, (B, L)), axis=1), jnp.int32)}


def place(mesh: jax.sharding.Mesh, x: dict[str, Any], spec: jax.P, layout: str = "contiguous") -> dict[str, Any]:
    """All arrays in `layout`, sharded over the mesh by `spec` of [B, L, heads, D]."""
    specs = {1: jax.P(*spec[2:3]), 2: jax.P(*spec[:2]), 4: spec}
    lying = {name: permute(each, layout, mesh.shape["context"]) for name, each in x.items() if each.ndim > 1}
    return {n: jax.device_put(each, jax.NamedSharding(mesh, specs[each.ndim])) for n, each in {**x, **lying}.items()}


def assert_exact(out: Any, x: dict[str, Any], layout: str = "contiguous", shards: int = 1, **how: Any) -> None:
    """out, lying in `layout`, is what dense attention in float64 gives."""
    with jax.enable_x64(True):
        wide = {n: np.asarray(each, np.float64) if each.dtype == jnp.float32 else each for n, each in x.items()}
        exact = np.asarray(dense_attention(**{n: jnp.asarray(each) for n, each in wide.items()}, **how))
    exact = permute(exact, layout, shards)
    assert out.dtype == jnp.float32
    assert np.linalg.norm(out - exact) <= 2e-6 * np.linalg.norm(exact)


def a_mesh(kind: AxisType, data: int = 1, context: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * context * tensor]
    return jax.make_mesh((data, context, tensor), ("data", "context", "tensor"), (kind,) * 3, devices=devices)


SPEC = jax.P(None, "context")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_batch_sequence_and_heads_all_sharded(kind, run):
    mesh, spec = a_mesh(kind, 2, 2, 2), jax.P("data", "context", "tensor")
    x = arrays() | {"sinks": jnp.arange(float(H)), "slopes": 2.0 ** -jnp.arange(1.0, 5.0)}
    with jax.set_mesh(mesh):
        given = place(mesh, x, spec, "zigzag") | {"slopes": x["slopes"]}  # sharded sinks, whole slopes
        how: dict[str, Any] = {} if kind == AxisType.Explicit else {"spec": spec}
        out = run(lambda x: attention(**x, layout="zigzag", **how))(given)
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 4)
    assert_exact(out, x, "zigzag", 2)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_ids_may_be_whole_on_every_device(kind):
    x = arrays()
    with jax.set_mesh(mesh := a_mesh(kind, context=4)):
        given = place(mesh, x, SPEC)
        replicated = jax.device_put(x["segment_ids"], jax.NamedSharding(mesh, jax.P()))
        out = attention(**given | {"segment_ids": replicated})
    assert_exact(out, x)


def test_the_default_spec_in_an_auto_mesh_shards_the_sequence_alone():
    x = arrays()
    with jax.set_mesh(mesh := a_mesh(AxisType.Auto, context=8)):
        out = attention(**place(mesh, x, SPEC))
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, SPEC), 4)
    assert_exact(out, x)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_the_future_has_exactly_no_gradient(make_mesh, strategy):
    x = arrays()
    del x["segment_ids"]
    at = 37
    with jax.set_mesh(mesh := make_mesh(context=2)):
        lying = place(mesh, x, SPEC, "zigzag")
        here = permute(jnp.arange(L) == at, "zigzag", 2, dim=0).astype(jnp.float32)

        def loss(x):
            return (attention(**x, layout="zigzag", strategy=strategy) * here[None, :, None, None]).sum()

        gradients = jax.jit(jax.grad(loss))(lying)
    order = permute(np.arange(L), "zigzag", 2, dim=0)
    for name, gradient in gradients.items():
        felt = np.max(abs(np.asarray(gradient)), (0, 2, 3)) > 0
        assert not felt[order > at].any(), name
        assert felt[order == at].all(), name
        assert name == "query" or felt[order <= at].all(), name


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
        together = gradient(placed, ids)
        alone = jax.jit(jax.grad(lambda x, ids: jnp.sin(attention(**x, segment_ids=ids, mask=Mask(window=20))).sum()))
        for n in range(2):
            one = alone(jax.tree.map(lambda x, n=n: x[n], placed), ids[n])
            jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, atol=2e-6), together, one)
    for n, x in enumerate(rows):
        assert_exact(out[n], x, mask=Mask(window=20))


@pytest.mark.parametrize(
    ("strategy", "check_vma"), [("ring", True), ("ring", False), ("gather", True), ("ulysses", True)]
)
def test_inside_ones_own_shard_map(make_mesh, strategy, check_vma):
    x = arrays()
    sinks = jnp.linspace(-1, 1, H)
    with jax.set_mesh(mesh := make_mesh(context=2)):
        given = place(mesh, x, SPEC, "striped")

        def local(x, sinks):
            return shard_attention(**x, sinks=sinks, layout="striped", strategy=strategy)

        specs = {name: jax.P(*SPEC[: min(each.ndim, 2)]) for name, each in given.items()}
        f = jax.shard_map(local, in_specs=(specs, jax.P()), out_specs=SPEC, check_vma=check_vma)
        out = jax.jit(f)(given, sinks)
        ids = given.pop("segment_ids")

        def loss(f: Callable) -> Callable:
            return lambda x, sinks: jnp.sin(f(x | {"segment_ids": ids}, sinks)).sum()

        gradients = jax.jit(jax.grad(loss(f), (0, 1)))(given, sinks)
        expected = jax.jit(
            jax.grad(loss(lambda x, sinks: attention(**x, sinks=sinks, layout="striped", strategy="gather")), (0, 1))
        )(given, sinks)
    assert_exact(out, x | {"sinks": sinks}, "striped", 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), gradients, expected)


def test_a_sink_of_minus_infinity_is_none():
    x = arrays()
    x["segment_ids"] = x["segment_ids"].at[0, :5].set(-1)
    with jax.set_mesh(mesh := a_mesh(AxisType.Auto, context=2)):
        given = place(mesh, x, SPEC)
        gradient = jax.grad(lambda sinks: attention(**given, sinks=sinks).sum())(jnp.full(H, -jnp.inf))
        out = attention(**given, sinks=jnp.full(H, -jnp.inf))
    assert_exact(out, x)
    np.testing.assert_array_equal(gradient, 0.0)


def test_in_float64_all_is_float64():
    with jax.enable_x64(True), jax.set_mesh(mesh := a_mesh(AxisType.Auto, context=2)):
        x = arrays()
        x |= {name: x[name].astype(jnp.float64) for name in ("query", "key", "value")}
        out = attention(**place(mesh, x, SPEC, "zigzag"), layout="zigzag")
        exact = permute(dense_attention(**x), "zigzag", 2)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, exact, atol=1e-13)


def test_more_queries_than_keys_begin_before_them(make_mesh):
    x = {name: each for name, each in arrays().items() if name != "segment_ids"}
    x |= {name: x[name][:, :48] for name in ("key", "value")}
    for mask in (Mask(), Mask(causal=False), Mask(window=20)):
        with jax.set_mesh(mesh := make_mesh(context=4)):
            out = attention(**place(mesh, x, SPEC), mask=mask)
        assert_exact(out, x, mask=mask)
        assert not mask.causal or not np.asarray(out)[:, :16].any()


def test_gradients_may_travel_in_half_the_bytes(make_mesh):
    x = {name: each for name, each in arrays().items() if name != "segment_ids"}

    def gradients(**how: Any) -> dict[str, Any]:
        run = jax.jit(jax.grad(lambda x: jnp.sin(attention(**x, **how)).sum()))
        return {name: np.asarray(each) for name, each in run(given).items()}

    with jax.set_mesh(mesh := make_mesh(context=4)):
        given = place(mesh, x, SPEC)
        for strategy in ("ring", "gather"):
            exact, rounded = gradients(strategy=strategy), gradients(strategy=strategy, reduce_dtype="bfloat16")
            np.testing.assert_array_equal(exact["query"], rounded["query"])
            for name in ("key", "value"):
                error = np.linalg.norm(exact[name] - rounded[name]) / np.linalg.norm(exact[name])
                assert 1e-4 < error < 1e-2, (strategy, name)


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


IDS = zeros(B, L, dtype=jnp.int32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"query": zeros(B, 60, H, D)}, r"length L=60 must be a .*multiple of context = 8 .*use 56 or 64"),
    "zigzag": (
        {"query": zeros(B, 72, H, D), "layout": "zigzag"},
        r"L=72 must be .*multiple of 2 \* context = 16 .*use 64 or 80, or layout='contiguous'",
    ),
    "layout": ({"layout": "spiral"}, "layout='spiral' is none of 'contiguous', 'striped', 'zigzag'"),
    "heads": ({"query": zeros(B, L, 5, D)}, "H=5 query heads must be a multiple of G=2 K/V heads: use H=4"),
    "few heads": ({"query": zeros(B, L, 1, D)}, "H=1 query heads must be a multiple of G=2 K/V heads: use H=2"),
    "dims": ({"query": zeros(L, H, D)}, r"must be \[B, L, heads, D\], not \(64, 4, 8\), \(2, 64, 2, 8\)"),
    "key length": (
        {"key": zeros(B, 32, G, D)},
        r"key \(2, 32, 2, 8\), value \(2, 64, 2, 8\) must agree in B, .* value with key also in length",
    ),
    "key depth": ({"key": zeros(B, L, G, 4)}, r"key \(2, 64, 2, 4\), .* key with query also in D"),
    "dtypes": ({"key": zeros(B, L, G, D, dtype=jnp.bfloat16)}, "one float dtype, not float32, bfloat16, float32"),
    "ids' dtype": (
        {"segment_ids": IDS.astype(jnp.float32)},
        r"segment_ids must be int32 \(2, 64\).* not float32 \(2, 64\)",
    ),
    "ids' width": ({"span_ids": IDS.astype(jnp.int16)}, r"span_ids must be int32 \(2, 64\).* not int16"),
    "ids' shape": ({"segment_ids": IDS[:, :32]}, r"segment_ids must be int32 \(2, 64\).* not int32 \(2, 32\)"),
    "positions": ({"positions": IDS[:1]}, r"positions must be int32 \(2, 64\).* not int32 \(1, 64\)"),
    "pair": (
        {"query": zeros(B, 32, H, D), "segment_ids": IDS},
        r"segment_ids: for queries and keys of their own give a pair of int32 arrays of \(\(2, 32\), \(2, 64\)\)",
    ),
    "half a pair": ({"positions": (IDS, None)}, "positions: for queries and keys of their own give a pair"),
    "a list": ({"span_ids": [IDS, IDS]}, "span_ids: for queries and keys of their own give a pair"),
    "pair's shape": ({"positions": (IDS, IDS[:, :8])}, r"positions must be int32 \(2, 64\).* not int32 \(2, 8\)"),
    "keys' length": (
        {"key": zeros(B, 60, G, D), "value": zeros(B, 60, G, D)},
        r"key's length M=60 must be a .*multiple of context = 8 .*use 56 or 64",
    ),
    "reduce_dtype": ({"reduce_dtype": "int8"}, "reduce_dtype='int8' is none of 'bfloat16', 'float16', 'float32'; or"),
    "reduce and exchange": (
        {"reduce_dtype": "bfloat16", "strategy": "ulysses"},
        "strategy='ulysses' sums no gradients on the wire; leave it out",
    ),
    "sinks": ({"sinks": zeros(G)}, r"sinks must be float \(4,\), one per query head, not float32 \(2,\)"),
    "slopes": ({"slopes": zeros(H, dtype=jnp.int32)}, r"slopes must be float \(4,\), .* not int32 \(4,\)"),
    "soft_cap": ({"soft_cap": -2.0}, "soft_cap=-2.0 must be positive; None for no cap"),
    "strategy": ({"strategy": "star"}, "strategy='star' is none of 'ring', 'gather', 'ulysses', 'usp', 'auto'"),
    "kernel": ({"kernel": "flush"}, "kernel='flush' is none of 'auto', 'xla'"),
    "axis": (
        {"axis": "ring"},
        r"axis='ring' is not in the mesh, whose axes are \('data', 'context_outer', 'context', 'tensor'\)",
    ),
    "axes": ({"axis": ("context", "context")}, "two different ones"),
    "usp": (
        {"strategy": "usp"},
        r"'usp' needs axis=\(outer, inner\), not 'context'; 'ring' and 'ulysses' need one axis",
    ),
    "spec's sequence": ({"spec": jax.P(None, "data")}, "sequence over 'data', but axis='context': they must agree"),
    "spec's depth": ({"spec": jax.P(None, "context", None, "tensor")}, "shards the head dim over 'tensor'"),
    "spec's axis": ({"spec": jax.P("rows", "context")}, r"names 'rows', but the mesh has the axes \('data', "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_both_values_and_a_cure(name, make_mesh, unchecked):
    wrong, message = REFUSED[name]
    given = {n: x for n, x in arrays().items() if n != "segment_ids"}
    if name in ("length", "zigzag"):
        wrong = {**wrong, **{n: zeros(B, wrong["query"].shape[1], G, D) for n in ("key", "value")}}
    with jax.set_mesh(make_mesh(context=8)), pytest.raises(ValueError, match=message):
        attention(**{**given, **wrong})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 4}, "B=2 does not split over the 4 devices of 'data': use a multiple of 4"),
        ({"tensor": 4}, "G=2 does not split over the 4 devices of 'tensor': use a multiple of 4"),
    ],
)
def test_a_batch_or_heads_that_do_not_split_are_refused(make_mesh, sizes, message):
    with jax.set_mesh(make_mesh(context=2, **sizes)), pytest.raises(ValueError, match=message):
        attention(**arrays(), spec=jax.P("data", "context", "tensor"))


def test_without_a_mesh_the_error_says_how_to_set_one():
    with pytest.raises(ValueError, match=r"no mesh is set: first call jax\.set_mesh"):
        attention(**arrays())


def test_inside_a_shard_map_the_error_names_the_function_for_it(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=2)):
        given = place(mesh, arrays(), SPEC)
        specs = jax.tree.map(lambda x: jax.P(*SPEC[: min(x.ndim, 2)]), given)
        f = jax.shard_map(lambda x: attention(**x), in_specs=(specs,), out_specs=SPEC)
        with pytest.raises(ValueError, match=r"'context' is manual here.* call ringattn\.shard_attention"):
            f(given)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_nothing_of_what_lies_in_padding_comes_out(make_mesh, strategy):
    x = arrays()
    padding = np.asarray(x["segment_ids"]) < 0
    assert padding.any()
    spoilt = {
        name: jnp.asarray(np.where(padding[:, :, None, None], np.nan, x[name])) for name in ("query", "key", "value")
    }
    with jax.set_mesh(mesh := make_mesh(context=2)):

        @jax.jit
        def out_and_gradient(x, ids):
            out, back = jax.vjp(lambda x: attention(**x, segment_ids=ids, strategy=strategy), x)
            return out, back(jnp.where(ids[:, :, None, None] < 0, jnp.nan, jnp.ones_like(out)))[0]

        results = []
        for given in (x, x | spoilt):
            given = place(mesh, given, SPEC)
            ids = given.pop("segment_ids")
            results.append(out_and_gradient(given, ids))
    jax.tree.map(np.testing.assert_array_equal, *results)
    for gradient in results[0][1].values():
        assert not np.asarray(gradient)[padding].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "ulyses"}, "strategy='ulyses' is none of 'ring', 'gather'"),
        ({"layout": "Contiguous"}, "layout='Contiguous' is none of 'contiguous'"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"strategy": "usp"}, r"strategy='usp' needs axis=\(outer, inner\)"),
        ({"layout": "zigzag", "odd": True}, r"=62 must be a positive multiple of 2 \* context = 4 .* use 60 or 64"),
        ({"sinks": jnp.ones(3)}, r"sinks must be float \(4,\), one per query head, not float32 \(3,\)"),
    ],
)
def test_shard_attention_refuses_as_attention_does(make_mesh, wrong, message, unchecked):
    x = arrays()
    odd = {name: each[:, : L - 2] for name, each in x.items()} if wrong.pop("odd", False) else x
    with jax.set_mesh(mesh := make_mesh(context=2)):
        given = place(mesh, odd, SPEC)
        ids = given.pop("segment_ids")
        specs = jax.tree.map(lambda _: SPEC, given)
        run = jax.shard_map(
            lambda x, i: shard_attention(**x, segment_ids=i, **wrong), in_specs=(specs, SPEC), out_specs=SPEC
        )
        with pytest.raises(ValueError, match=message):
            run(given, ids)
