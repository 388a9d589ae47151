"""The transformer: the same on every mesh, causal, with flat memory under rematerialization."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from wire import permuted

from ringattn import attention, config
from ringattn.mesh.axes import FSDP, SEQUENCE, TENSOR, TOKENS, abstract, place
from ringattn.model import parallel
from ringattn.model.loss import cross_entropy
from ringattn.model.transformer import REMAT_POLICIES, Transformer, count_parameters

VOCABULARY, PADDED = 257, 384
ROWS, LENGTH = 4, 32
SMALL = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64)
UNTIED = replace(SMALL, tied=False)
PATTERN = replace(SMALL, layers=7, window=3, pattern=("window", "window", "full"))
"""Two groups of three layers, and one layer of a third."""


def make(section=SMALL, seed=0):
    return Transformer(section, VOCABULARY, partial(attention, axis=SEQUENCE), nnx.Rngs(params=seed))


def make_params(section=SMALL, seed=0):
    return nnx.state(make(section, seed), nnx.Param)


def merge(section, params) -> Transformer:
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(section))), params)


def place_tokens(mesh):
    """Tokens, positions and segment ids on `mesh`, with two documents per row."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    index = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    segments = (index >= 20).astype(np.int32)
    return place((tokens, index - 20 * segments, segments), mesh, TOKENS)


@pytest.fixture(scope="module")
def initial(make_mesh):
    """Parameters of the untied model on one device, as NumPy arrays; the tied model has all but the last of them."""
    with jax.set_mesh(make_mesh()):
        return jax.device_get(jax.jit(partial(make_params, UNTIED))())


@pytest.fixture(scope="module")
def place_params(initial):
    """place_params(mesh, section): the initial parameters of a model, sharded over `mesh`."""

    arrays = dict(jax.tree_util.tree_leaves_with_path(initial))

    def place_initial(mesh, section=SMALL):
        like = abstract(jax.eval_shape(partial(make_params, section)), mesh)
        return jax.tree_util.tree_map_with_path(lambda path, x: jax.device_put(arrays[path], x.sharding), like)

    return place_initial


@pytest.fixture(scope="module")
def run_model(place_params):
    """run_model(mesh, section): hidden states and logits."""

    def run(mesh, section=SMALL):
        with jax.set_mesh(mesh):

            @jax.jit
            def both(params, arrays):
                model = merge(section, params)
                return model(*arrays), model.logits(*arrays)

            return both(place_params(mesh, section), place_tokens(mesh))

    return run


@pytest.fixture(scope="module")
def hidden_states(run_model, make_mesh):
    """Hidden states computed on one device, the same for the tied and the untied model."""
    return np.asarray(run_model(make_mesh())[0])


@pytest.mark.parametrize(
    ("sizes", "section"),
    [
        pytest.param((1, 8, 1), SMALL, id="context"),
        pytest.param((1, 1, 2), SMALL, id="tensor"),
        pytest.param((2, 2, 2), SMALL, id="all"),
        pytest.param((2, 2, 2), UNTIED, id="all-untied"),
    ],
)
def test_hidden_states_and_logits_do_not_depend_on_the_mesh(
    initial, run_model, hidden_states, make_mesh, sizes, section
):
    hidden, logits = run_model(make_mesh(*sizes), section)
    assert hidden.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(hidden, hidden_states, atol=2e-5)
    table = initial["embedding" if section.tied else "unembedding"][...]
    assert table.shape == (PADDED, section.dim)
    chex.assert_shape(logits, (ROWS, LENGTH, VOCABULARY))
    expected = np.asarray(hidden, np.float64) @ table.astype(np.float64).T
    np.testing.assert_allclose(logits, expected[..., :VOCABULARY], atol=1e-6)


def test_bfloat16_follows_float32(run_model, hidden_states, make_mesh):
    hidden, logits = run_model(make_mesh(1, 2, 2), replace(UNTIED, dtype="bfloat16"))
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    error = np.asarray(hidden, np.float32) - hidden_states
    assert 0 < np.linalg.norm(error) / np.linalg.norm(hidden_states) < 0.03


def test_the_loss_at_a_token_has_gradients_only_at_earlier_tokens_of_its_document(make_mesh, place_params):
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        params, (targets, positions, segments) = place_params(mesh), place_tokens(mesh)
        # Token i is id i, so that row i of the embedding's gradient is the gradient at token i.
        ids = place(np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)), mesh, TOKENS)

        def loss(params, chosen):
            model = merge(SMALL, params)
            weights = jax.nn.one_hot(chosen, LENGTH, dtype=jnp.float32)[None, :] * jnp.ones((ROWS, 1))
            table = jax.lax.stop_gradient(model.output_table())
            weights = jax.reshard(weights, TOKENS)
            return cross_entropy(model(ids, positions, segments), table, targets, weights, VOCABULARY)

        gradient = jax.jit(jax.grad(loss))
        for chosen in (0, 7, 19, 25):
            by_token = np.abs(gradient(params, jnp.int32(chosen))["embedding"][...]).sum(axis=1)[:LENGTH]
            first = 20 if chosen >= 20 else 0
            assert (by_token[first : chosen + 1] > 0).all()
            assert not by_token[:first].any()
            assert not by_token[chosen + 1 :].any()


def test_parameters_are_sharded_and_do_not_depend_on_the_mesh(make_mesh, initial):
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params: Any = jax.jit(partial(make_params, UNTIED))()
    chex.assert_trees_all_equal(jax.device_get(params), initial)
    assert params["layers"]["attention"]["query"][...].sharding.spec == P(None, FSDP, TENSOR, None)
    assert params["layers"]["attention"]["output"][...].sharding.spec == P(None, TENSOR, None, FSDP)
    embedding = params["embedding"][...]
    chex.assert_shape(embedding, (PADDED, 32))
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(192, 8)}


def test_the_seed_changes_the_parameters_and_tying_their_number(make_mesh, initial):
    with jax.set_mesh(make_mesh()):
        other = jax.device_get(jax.jit(partial(make_params, UNTIED, seed=1))())
        tied = jax.eval_shape(make_params)
    drawn = zip(*map(jax.tree.leaves, (initial, other)), strict=True)
    assert all(np.array_equal(a, b) == (a == 1).all() for a, b in drawn)  # norm scales are 1
    assert count_parameters(initial) == count_parameters(tied) + PADDED * 32
    layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 64 + 2 * 32
    assert count_parameters(tied) == 2 * layer + 32 + PADDED * 32


@pytest.mark.parametrize("graph", [True, False])
def test_works_in_both_modes_of_nnx(make_mesh, place_params, hidden_states, graph):
    before = flax.config.nnx_graph_mode
    flax.config.update("nnx_graph_mode", graph)
    try:
        mesh = make_mesh(context=2)
        with jax.set_mesh(mesh):
            graphdef, _ = nnx.split(nnx.eval_shape(make))
            run = jax.jit(lambda params, arrays: nnx.merge(graphdef, params)(*arrays))
            hidden = run(place_params(mesh), place_tokens(mesh))
    finally:
        flax.config.update("nnx_graph_mode", before)
    np.testing.assert_allclose(hidden, hidden_states, atol=2e-5)


def mean_loss(section, params, arrays):
    """Mean loss of predicting each token from itself."""
    model = merge(section, params)
    weights = jnp.full(arrays[0].shape, 1 / arrays[0].size, jnp.float32, out_sharding=TOKENS)
    return cross_entropy(model(*arrays), model.output_table(), arrays[0], weights, VOCABULARY)


def shapes(mesh, section=SMALL, batch=(ROWS, LENGTH)):
    """Abstract parameters and token arrays, the arguments of `mean_loss`; call it under the mesh."""
    ids = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=jax.NamedSharding(mesh, TOKENS))
    return jax.eval_shape(partial(make_params, section)), [ids] * 3


MEMORY = [*((remat, 1) for remat in REMAT_POLICIES), ("off", 2), ("on", 2), ("offload_inputs", 2)]
"""Values of remat and head_groups."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "dtype", "policies"),
    [
        (SMALL, "float32", MEMORY[1:]),
        (SMALL, "bfloat16", [("on", 1), ("offload", 1), ("offload_inputs", 2)]),
        (replace(SMALL, layers=8), "float32", [("offload_groups", 1)]),
        (PATTERN, "float32", [("offload_groups", 1)]),
    ],
    ids=["float32", "bfloat16", "two-groups", "pattern"],
)
def test_rematerialization_changes_no_gradient(make_mesh, monkeypatch, section, dtype, policies):
    monkeypatch.setattr(parallel, "CHUNK", 5)  # three chunks of a device's 16 tokens, and a remainder
    section = replace(section, kv_heads=4, dtype=dtype)  # two groups of heads on two devices
    results = {}
    with jax.set_mesh(mesh := make_mesh(data=2, context=2, tensor=2)):
        params, arrays = jax.jit(partial(make_params, section))(), place_tokens(mesh)
        for remat, groups in [("off", 1), *policies]:
            loss = partial(mean_loss, replace(section, remat=remat, head_groups=groups))
            results[remat, groups] = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, arrays))
    off = results["off", 1]
    scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(off[1]))
    rounding = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    for result in results.values():
        chex.assert_trees_all_close(off, result, atol=rounding * scale, rtol=rounding)


def rotations(remat: str) -> int:
    """Rotations of K/V in a step: forward, backward, and once more where attention is computed again."""
    return 3 if remat in ("offload_inputs", "offload_groups") else 2


@pytest.mark.parametrize(("remat", "groups"), MEMORY)
def test_a_layer_rotates_its_kv_twice(make_mesh, remat, groups):
    section = replace(SMALL, layers=8, remat=remat, head_groups=groups)
    with jax.set_mesh(mesh := make_mesh(context=4)):
        unit = (ROWS, SMALL.kv_heads // groups, LENGTH // 4, SMALL.head_dim), "float32"
        sent = permuted(jax.grad(partial(mean_loss, section)), *shapes(mesh, section))
    # K and V of each layer: three hops per rotation, and three of their gradients.
    assert sent[unit] == 8 * groups * 2 * (3 * rotations(remat) + 3)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_a_window_layer_skips_hops_also_in_a_pattern(make_mesh, remat):
    with jax.set_mesh(mesh := make_mesh(context=4)):
        unit = (ROWS, SMALL.kv_heads, LENGTH // 4, SMALL.head_dim), "float32"
        section = replace(PATTERN, remat=remat)
        sent = permuted(jax.grad(partial(mean_loss, section)), *shapes(mesh, section))
    # A window of 3 reaches one shard of 8 tokens back: one hop per rotation, and one of the gradients. The last layer,
    # a window layer, is in no group.
    last = 2 if remat == "offload_groups" else rotations(remat)
    assert sent[unit] == 2 * (4 * (rotations(remat) + 1) + (last + 1) + 2 * 3 * (rotations(remat) + 1))


def temporaries(mesh, section, batch) -> int:
    """Temporary bytes per device of the gradient of `mean_loss`, from the compiler. Call it under the mesh."""
    plan = jax.jit(jax.grad(partial(mean_loss, section))).lower(*shapes(mesh, section, batch)).compile()
    analysis = plan.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_a_rematerialized_layer_saves_only_its_input_and_the_result_of_attention(make_mesh):
    length, wide = 4096, replace(SMALL, feed_forward=256)

    def bytes_per_layer(section: config.Model) -> float:
        deep, shallow = (temporaries(mesh, replace(section, layers=layers), (1, length)) for layers in (12, 4))
        return (deep - shallow) / 8

    with jax.set_mesh(mesh := make_mesh()):
        on, off = (bytes_per_layer(replace(wide, remat=remat)) for remat in ("on", "off"))
    saved = 4 * length * (wide.dim + wide.heads * wide.head_dim + wide.heads)
    weights = 4 * (wide.dim * wide.head_dim * (2 * wide.heads + 2 * wide.kv_heads) + 3 * wide.dim * wide.feed_forward)
    assert on < 1.05 * saved + 2 * weights
    assert off > 3 * saved


@pytest.mark.parametrize(
    ("layers", "values"),
    [
        (12, {"dtype": "float32"}),
        (12, {"dtype": "bfloat16"}),
        (13, {"window": 3, "pattern": ("window", "full")}),
        pytest.param(25, {"window": 3, "pattern": ("window", "window", "full")}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_device_holds_gathered_weights_of_one_layer_only(make_mesh, layers, values):
    section = replace(SMALL, layers=layers, dim=256, feed_forward=1024, **values)
    with jax.set_mesh(mesh := make_mesh(context=8)):
        size = temporaries(mesh, section, (1, 64))
    layer = 4 * 3 * section.dim * section.feed_forward
    # A second copy of the device's parameters, as if a remainder were split from the stacks, exceeds the bound.
    shards = layers * layer / 8
    assert size < 4 * layer + 1.5 * shards < 12 * layer


@pytest.mark.parametrize("remat", ["on", "offload", "offload_groups"])
def test_a_pattern_does_not_copy_the_stacks_of_parameters(make_mesh, remat):
    section = replace(PATTERN, dim=40, feed_forward=80, remat=remat)
    with jax.set_mesh(mesh := make_mesh(context=2)):
        text = jax.jit(jax.grad(partial(mean_loss, section))).lower(*shapes(mesh, section)).as_text()
    # Neither slices of several layers, nor a stack or a layer's parameters per step of a scan.
    assert set(re.findall(r"tensor<([\dx]*40x80)xf32>", text)) == {"7x40x80", "1x40x80", "40x80"}


@pytest.mark.parametrize(
    ("section", "layers"),
    [(SMALL, (2, 16)), (PATTERN, (6, 48)), (PATTERN, (7, 49))],
    ids=["one-kind", "pattern", "pattern-and-remainder"],
)
def test_the_program_does_not_grow_with_depth(make_mesh, section, layers):
    with jax.set_mesh(mesh := make_mesh(context=2)):

        def size(layers: int) -> int:
            deep = replace(section, layers=layers)
            return len(jax.jit(jax.grad(partial(mean_loss, deep))).lower(*shapes(mesh, deep)).as_text())

        shallow, deep = map(size, layers)
        assert deep < 1.02 * shallow


def test_long_rows_are_embedded_in_parts(make_mesh, monkeypatch):
    embed: Any = parallel.embed

    def run(table, tokens):
        embedded, pullback = jax.vjp(lambda table: embed(tokens, table, "float32"), table)
        return embedded, pullback(jnp.cos(embedded))[0]

    with jax.set_mesh(mesh := make_mesh(data=2, context=2, tensor=2)):
        tokens = place(np.arange(2 * 96, dtype=np.int32).reshape(2, 96) % 50, mesh, TOKENS)
        table = place(np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32), mesh, P(TENSOR, FSDP))
        whole = jax.device_get(jax.jit(run)(table, tokens))
        np.testing.assert_array_equal(whole[0], np.asarray(table)[np.asarray(tokens)])
        for size, loops in ((4 * 16, True), (4 * 17, True), (4 * 48, False)):  # a device has 48 tokens
            monkeypatch.setattr(parallel, "EMBEDDED", size)
            embed.clear_cache()
            program = jax.jit(partial(run)).lower(table, tokens)
            assert ("stablehlo.while" in program.as_text()) == loops
            parts = jax.device_get(program.compile()(table, tokens))
            np.testing.assert_array_equal(parts[0], whole[0])
            np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)
    embed.clear_cache()


def test_the_gradient_of_the_embedding_is_summed_in_float32(make_mesh):
    """A token that occurs 4,096 times: in bfloat16 its gradient would not grow beyond 256."""
    with jax.set_mesh(mesh := make_mesh(data=2, context=2, tensor=2)):
        table = place(np.ones((128, 32), np.float32), mesh, P(TENSOR, FSDP))
        tokens = place(np.full((4, 1024), 70, np.int32), mesh, TOKENS)

        def total(table):
            return jnp.sum(parallel.embed(tokens, table, "bfloat16").astype(jnp.float32))

        gradient = np.asarray(jax.jit(jax.grad(total))(table))
    np.testing.assert_array_equal(gradient, 4096.0 * (np.arange(128) == 70)[:, None] * np.ones((1, 32)))
