"""The arguments that `attention` and `shard_attention` refuse, and the messages that users see."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ringattn import Mask, attention, shard_attention
from ringattn.attn.checks import Extras, check_arrays
from ringattn.attn.settings import Settings

B, L, H, G, D = 2, 64, 4, 2, 8
SPEC = jax.P(None, "context")
EAGER_AND_JIT = pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


VALID: dict[str, Any] = {"query": zeros(B, L, H, D), "key": zeros(B, L, G, D), "value": zeros(B, L, G, D)}
IDS = zeros(B, L, dtype=jnp.int32)
NUMPY_IDS = np.zeros((B, L), np.int64)
ORDER = r"; the order of dims is \[B, L, heads, D\]: transpose \[B, heads, L, D\] by x\.swapaxes\(1, 2\)"
MASK = r"must be a ringattn.Mask: Mask\(\) is causal, Mask\(causal=False\) is not; instead of an array of token pairs"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"query": zeros(B, 60, H, D)}, r"length L=60 must be a .*multiple of context = 8 .*use 56 or 64"),
    "zigzag": (
        {"query": zeros(B, 72, H, D), "layout": "zigzag"},
        r"L=72 must be .*multiple of 2 \* context = 16 .*use 64 or 80, or layout='contiguous'",
    ),
    "layout": ({"layout": "spiral"}, "layout='spiral' must be one of 'contiguous', 'striped', 'zigzag'"),
    "heads": ({"query": zeros(B, L, 5, D)}, "H=5 query heads must be a multiple of G=2 K/V heads; use H=4"),
    "few heads": ({"query": zeros(B, L, 1, D)}, "H=1 query heads must be a multiple of G=2 K/V heads; use H=2"),
    "dims": ({"query": zeros(L, H, D)}, r"must be \[B, L, heads, D\], not \(64, 4, 8\), \(2, 64, 2, 8\)"),
    "key length": (
        {"key": zeros(B, 32, G, D)},
        r"key \(2, 32, 2, 8\), value \(2, 64, 2, 8\) must agree in B, .* value with key also in length",
    ),
    "key depth": ({"key": zeros(B, L, G, 4)}, r"key \(2, 64, 2, 4\), .* key with query also in D"),
    "dtypes": (
        {"key": zeros(B, L, G, D, dtype=jnp.bfloat16)},
        "must have one dtype, not float32, bfloat16, float32",
    ),
    "float16": (
        {name: zeros(B, L, heads, D, dtype=jnp.float16) for name, heads in (("query", H), ("key", G), ("value", G))},
        r"query.dtype=float16 must be float32 or bfloat16 .*; cast query, key and value with \.astype\('float32'\)",
    ),
    "int dtype": (
        {name: zeros(B, L, heads, D, dtype=jnp.int32) for name, heads in (("query", H), ("key", G), ("value", G))},
        "query.dtype=int32 must be float32 or bfloat16",
    ),
    "ids' dtype": (
        {"segment_ids": IDS.astype(jnp.float32)},
        r"segment_ids must be int32 \(2, 64\).* not float32 \(2, 64\)",
    ),
    "ids' width": ({"span_ids": IDS.astype(jnp.int16)}, r"span_ids must be int32 \(2, 64\).* not int16"),
    "ids' shape": ({"segment_ids": IDS[:, :32]}, r"segment_ids must be int32 \(2, 64\).* not int32 \(2, 32\)"),
    "positions": ({"positions": IDS[:1]}, r"positions must be int32 \(2, 64\).* not int32 \(1, 64\)"),
    "pair": (
        {"query": zeros(B, 32, H, D), "segment_ids": IDS},
        r"segment_ids must be a pair of int32 arrays, queries \(2, 32\) and keys \(2, 64\)",
    ),
    "half a pair": ({"positions": (IDS, None)}, "positions must be a pair of int32 arrays"),
    "a list": ({"span_ids": [IDS, IDS]}, "span_ids must be a pair of int32 arrays"),
    "pair's shape": ({"positions": (IDS, IDS[:, :8])}, r"positions must be int32 \(2, 64\).* not int32 \(2, 8\)"),
    "keys' length": (
        {"key": zeros(B, 60, G, D), "value": zeros(B, 60, G, D)},
        r"key's length M=60 must be a .*multiple of context = 8 .*use 56 or 64",
    ),
    "reduce_dtype": (
        {"reduce_dtype": "float16"},
        "reduce_dtype='float16' must be one of 'bfloat16', 'float32', or None",
    ),
    "reduce and exchange": (
        {"reduce_dtype": "bfloat16", "strategy": "ulysses"},
        "reduce_dtype='bfloat16' does not apply to strategy='ulysses'; use None",
    ),
    "sinks": ({"sinks": zeros(G)}, r"sinks must be float \(4,\), one per query head, not float32 \(2,\)"),
    "slopes": ({"slopes": zeros(H, dtype=jnp.int32)}, r"slopes must be float \(4,\), .* not int32 \(4,\)"),
    "soft_cap": ({"soft_cap": -2.0}, "soft_cap=-2.0 must be positive; use None for no cap"),
    "strategy": ({"strategy": "star"}, "strategy='star' must be one of 'ring', 'gather', 'ulysses', 'usp', 'auto'"),
    "kernel": ({"kernel": "flush"}, "kernel='flush' must be one of 'auto', 'xla', 'pallas', 'cudnn'"),
    "kernel of another device": ({"kernel": "cudnn"}, "kernel='cudnn' takes NVIDIA GPUs .*; use kernel='auto'"),
    "axis": (
        {"axis": "ring"},
        r"axis='ring' must be one of the mesh axes \('data', 'context_outer', 'context', 'tensor'\)",
    ),
    "axes": ({"axis": ("context", "context")}, "two different ones"),
    "usp": (
        {"strategy": "usp"},
        r"axis='context' must be a pair for strategy='usp'; use axis=\(outer, inner\), or strategy='ring' or 'ulysses'",
    ),
    "spec's sequence": (
        {"spec": jax.P(None, "data")},
        "shards the sequence over 'data', but axis='context'; they must agree",
    ),
    "spec's depth": (
        {"spec": jax.P(None, "context", None, "tensor")},
        "shards the head dim over 'tensor', which is not supported; use None",
    ),
    "long spec": (
        {"spec": jax.P(None, "context", None, None, None)},
        r"has 5 entries, but query \[B, L, H, D\] has 4 dims; use at most 4",
    ),
    "mask array": ({"mask": jnp.ones((L, L), bool)}, rf"mask=bool \(64, 64\) {MASK}"),
    "mask name": ({"mask": "causal"}, f"mask='causal' {MASK}"),
    "no mask": ({"mask": None}, f"mask=None {MASK}"),
    "scale text": ({"scale": "0.1"}, "scale='0.1' must be a finite number; use None"),
    "scale nan": ({"scale": math.nan}, "scale=nan must be a finite number"),
    "scale array": ({"scale": np.ones(H)}, r"scale=float64 \(4,\) must be a finite number"),
    "zero soft_cap": ({"soft_cap": 0}, "soft_cap=0.0 must be positive; use None for no cap"),
    "infinite soft_cap": ({"soft_cap": math.inf}, "soft_cap=inf must be a finite number"),
    "wide ids": (
        {"segment_ids": NUMPY_IDS + 2**31},
        "segment_ids has values from 2147483648 to 2147483648, which must fit int32",
    ),
    "numpy float ids": (
        {"segment_ids": NUMPY_IDS.astype(float)},
        r"segment_ids must be int32 .* not float64 \(2, 64\); use \.astype\('int32'\)",
    ),
    "numpy ids' shape": ({"positions": NUMPY_IDS[0]}, r"positions must be int32 \(2, 64\).* not int64 \(64,\)"),
    "one id": ({"segment_ids": 0}, "segment_ids=0 must be a JAX or NumPy array; use jnp.asarray"),
    "query list": ({"query": [0.0]}, r"query=\[0.0\] must be a JAX or NumPy array"),
    "sinks list": ({"sinks": [0.0] * H}, r"sinks=\[0.0, 0.0, 0.0, 0.0\] must be a JAX or NumPy array"),
    "heads first": (
        {"query": zeros(B, H, L, D), "key": zeros(B, H, L, D), "value": zeros(B, H, L, D)},
        rf"length L=4 must be a .*multiple of context = 8 .*use 8{ORDER}",
    ),
    "key's heads first": ({"key": zeros(B, G, L, D), "value": zeros(B, G, L, D)}, rf"H=4 query heads .*{ORDER}"),
    "value's heads first": ({"value": zeros(B, G, L, D)}, rf"must agree in B, .*{ORDER}"),
    "as many heads as devices first": (
        {"query": zeros(B, 8, L, D), "key": zeros(B, 8, L, D), "value": zeros(B, 8, L, D)},
        rf"key has 64 heads but only 8 tokens; .* pad it to 64 keys, with negative segment_ids{ORDER}",
    ),
    "kernel list": ({"kernel": ["xla"]}, r"kernel=\['xla'\] must be one of 'auto', 'xla'"),
    "no axis": ({"axis": None}, "axis=None must be one mesh axis or two different ones"),
    "axis number": ({"axis": 1}, "axis=1 must be one mesh axis or two different ones"),
    "spec name": (
        {"spec": "context"},
        r"spec='context' must be a jax.P of query \[B, L, H, D\]; for example jax.P\(None, 'context'\)",
    ),
    "spec entry": ({"spec": jax.P(1, "context")}, "has the entry 1; use a mesh axis, a tuple of mesh axes, or None"),
    "spec twice": ({"spec": jax.P("context", "context")}, "shards two dims over 'context'; use each mesh axis once"),
    "spec's axis": ({"spec": jax.P("rows", "context")}, r"names 'rows', which must be one of the mesh axes \('data', "),
}


@EAGER_AND_JIT
@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_with_a_fix(name, run, make_mesh, unchecked):
    wrong, message = REFUSED[name]
    arguments = {**VALID, **wrong}
    if name in ("length", "zigzag"):
        arguments |= {n: zeros(B, arguments["query"].shape[1], G, D) for n in ("key", "value")}
    arrays = {n: x for n, x in arguments.items() if isinstance(x, jax.Array)}
    with jax.set_mesh(make_mesh(context=8)), pytest.raises(ValueError, match=message):
        run(lambda arrays: attention(**{**arguments, **arrays}))(arrays)


@EAGER_AND_JIT
def test_arrays_sharded_as_heads_first_are_refused(run, make_mesh):
    with jax.set_mesh(make_mesh(context=8)):
        x = jax.device_put(zeros(B, 8, 32, D), jax.P(None, None, "context"))
        with pytest.raises(ValueError, match=rf"read from query, shards two dims over 'context'; .*{ORDER}"):
            run(lambda x: attention(x, x, x))(x)


@pytest.mark.parametrize(
    ("name", "fix"), [("scale", "multiply query by it and use scale=1.0"), ("soft_cap", "make it a static argument")]
)
def test_numbers_must_be_known_when_tracing(name, fix, make_mesh, unchecked):
    with jax.set_mesh(make_mesh(context=8)), pytest.raises(ValueError, match=f"{name}=.* not a traced array; {fix}"):
        jax.jit(lambda number: attention(**VALID, **{name: number}))(0.5)


@pytest.mark.parametrize("x64", [False, True])
def test_integer_ids_of_numpy_become_int32(x64, make_mesh):
    ids: dict[str, Any] = {
        "segment_ids": np.tile(np.repeat([0, 1, -1], [20, 40, 4]), (B, 1)),
        "span_ids": np.ones((B, L), np.uint8),
        "positions": (np.tile(np.arange(L), (B, 1)), np.full((B, L), 2**31 - 1)),
    }
    with jax.enable_x64(x64), jax.set_mesh(make_mesh(context=2)):
        extras = check_arrays(**VALID, extras=Extras(**ids, sinks=None, slopes=None))
        for name, given in ids.items():
            actual = extras._asdict()[name]
            assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype("int32")}
            jax.tree.map(np.testing.assert_array_equal, actual, given)
        assert jax.eval_shape(lambda x: attention(**x, **ids), VALID).shape == (B, L, H, D)


def mesh_of(data: AxisType, others: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), (data, others, others))


@EAGER_AND_JIT
@pytest.mark.parametrize("others", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_is_not_silently_replicated_over_auto_axes(others, run):
    rule = r"spec=None would replicate query over \['data', 'tensor'\] of a mesh with auto axes"
    fix = r"use spec=jax\.P\('data', 'context'\) to shard the batch, or jax\.P\(None, 'context'\) to replicate it"
    with jax.set_mesh(mesh_of(AxisType.Auto, others)), pytest.raises(ValueError, match=f"{rule}; {fix}"):
        run(lambda x: attention(**x))(VALID)


@pytest.mark.parametrize(("batch", "local"), [(None, B), ("data", B // 2)])
def test_the_spec_says_whether_auto_axes_replicate(batch, local):
    with jax.set_mesh(mesh_of(AxisType.Auto, AxisType.Auto)):
        program = str(jax.make_jaxpr(lambda x: attention(**x, spec=jax.P(batch, "context")))(VALID))
    assert f"f32[{local},{L // 2},{H},{D}]" in program


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 4}, "B=2 must be a multiple of the 4 devices of 'data'; use a multiple, or another spec"),
        ({"tensor": 4}, "G=2 must be a multiple of the 4 devices of 'tensor'"),
    ],
)
def test_batches_and_heads_that_do_not_split_are_refused(make_mesh, sizes, message):
    with jax.set_mesh(make_mesh(context=2, **sizes)), pytest.raises(ValueError, match=message):
        attention(**VALID, spec=jax.P("data", "context", "tensor"))


def test_the_error_without_a_mesh_says_how_to_set_one():
    with pytest.raises(ValueError, match=r"no mesh is set; first call jax\.set_mesh"):
        attention(**VALID)


@EAGER_AND_JIT
def test_the_error_inside_a_shard_map_names_shard_attention(run, make_mesh):
    with jax.set_mesh(make_mesh(context=2)):
        f = jax.shard_map(lambda x: attention(**x), in_specs=jax.P(), out_specs=jax.P())
        with pytest.raises(ValueError, match=r"'context' is manual, .* call ringattn\.shard_attention"):
            run(f)(VALID)


@EAGER_AND_JIT
def test_shard_attention_outside_a_shard_map_is_refused(run, make_mesh):
    def call(x: dict[str, Any]) -> jax.Array:
        return run(lambda x: shard_attention(**x))(x)

    fix = "call shard_attention inside a jax.shard_map over this axis, or ringattn.attention outside of one"
    nothing = f"axis='context' must be manual, but there is no enclosing jax.shard_map; {fix}"
    with pytest.raises(ValueError, match=nothing):
        call(VALID)
    with jax.set_mesh(make_mesh(context=2)), pytest.raises(ValueError, match=nothing):
        call(VALID)
    with jax.set_mesh(mesh_of(AxisType.Auto, AxisType.Auto)):
        over_data = jax.shard_map(call, in_specs=jax.P(), out_specs=jax.P(), axis_names={"data"})
        with pytest.raises(ValueError, match=r"axis='context' must be manual, .* jax.shard_map is over \('data',\)"):
            run(over_data)(VALID)


@EAGER_AND_JIT
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"axis": "ring"}, "axis='ring' must be manual, but the enclosing jax.shard_map is over .*'context'"),
        ({"mask": "causal"}, r"mask='causal' must be a ringattn\.Mask"),
        ({"mask": np.ones((L, L), bool)}, r"mask=bool \(64, 64\) must be a ringattn\.Mask"),
        ({"scale": "0.1"}, r"scale='0\.1' must be a finite number"),
        ({"strategy": "ulyses"}, "strategy='ulyses' must be one of 'ring', 'gather'"),
        ({"layout": "Contiguous"}, "layout='Contiguous' must be one of 'contiguous'"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"strategy": "usp"}, r"axis='context' must be a pair for strategy='usp'; use axis=\(outer, inner\)"),
        ({"layout": "zigzag", "length": 62}, r"=62 must be a positive multiple of 2 \* context = 4 .* use 60 or 64"),
        ({"sinks": jnp.ones(3)}, r"sinks must be float \(4,\), one per query head, not float32 \(3,\)"),
        ({"segment_ids": jnp.ones((B, 32))}, r"segment_ids must be int32 \(2, 32\), .* not float32"),
        ({"segment_ids": np.full((B, 32), 2**40)}, "segment_ids has values from 1099511627776 .* must fit int32"),
        ({"swapped": True}, rf"key has 64 heads but only 8 tokens; .*{ORDER}"),
    ],
)
def test_shard_attention_refuses_as_attention_does(run, make_mesh, wrong, message, unchecked):
    options = dict(wrong)
    x = {name: x[:, : options.get("length", L)] for name, x in VALID.items()}
    if options.pop("swapped", False):
        x = dict.fromkeys(VALID, zeros(B, 8, L, D))
    options.pop("length", None)
    with jax.set_mesh(make_mesh(context=2)):
        x = {name: jax.device_put(x, SPEC) for name, x in x.items()}
        f = jax.shard_map(lambda x: shard_attention(**x, **options), in_specs=SPEC, out_specs=SPEC)
        with pytest.raises(ValueError, match=message):
            run(f)(x)


@pytest.mark.parametrize(("axis", "expected"), [(["outer", "inner"], ("outer", "inner")), (("ring",), "ring")])
def test_an_axis_may_be_a_list(unchecked, axis, expected):
    """A list, as from a JSON file, is hashable in Settings; a tuple of one name is that name."""
    settings, same = (
        Settings(
            mask=Mask(),
            layout="contiguous",
            strategy="ring",
            axis=each,
            scale=None,
            soft_cap=None,
            kernel="auto",
            reduce_dtype=None,
        )
        for each in (axis, expected)
    )
    assert settings.axis == expected
    assert hash(settings) == hash(same)
