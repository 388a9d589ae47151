from dataclasses import replace
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from wire import permuted

from ringattn import attention, config
from ringattn.mesh import FSDP, SEQUENCE, TENSOR, TOKENS, place
from ringattn.model import Transformer, count_parameters, transformer
from ringattn.training.loss import cross_entropy

VOCABULARY = 257
ROWS, LENGTH = 4, 32
SMALL = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64)


def make(section=SMALL, seed=0):
    return Transformer(section, VOCABULARY, partial(attention, axis=SEQUENCE), nnx.Rngs(params=seed))


def tokens_on(mesh):
    """Tokens, positions and segment ids of rows that each hold two documents."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    place_in_row = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    segments = (place_in_row >= 20).astype(np.int32)
    return place((tokens, place_in_row - 20 * segments, segments), mesh, TOKENS)


def hidden_states(mesh, section=SMALL):
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *arrays: make(section)(*arrays))
        return run(*tokens_on(mesh))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 2)], ids=str)
def test_sharded_is_the_same_as_on_one_device(make_mesh, sizes):
    alone = hidden_states(make_mesh())
    spread = hidden_states(make_mesh(*sizes))
    assert spread.dtype == jnp.float32
    np.testing.assert_allclose(spread, alone, atol=2e-5)


def test_bfloat16_follows_float32(make_mesh):
    narrow = replace(SMALL, dtype="bfloat16", tied=False)
    wide = replace(narrow, dtype="float32")
    out, reference = (hidden_states(make_mesh(1, 2, 2), section) for section in (narrow, wide))
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32) - np.asarray(reference)
    assert 0 < np.linalg.norm(error) / np.linalg.norm(reference) < 0.03


def test_the_loss_at_a_token_has_no_gradient_beyond_it_nor_in_another_document(make_mesh):
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        model, arrays = jax.jit(make)(), tokens_on(mesh)
        # What the embedding yields is what a gradient can be taken by: each token gets its own row of the table.
        own = place(np.arange(LENGTH, dtype=np.int32)[None] + np.zeros((ROWS, 1), np.int32), mesh, TOKENS)
        graphdef, params = nnx.split(model)

        def loss(params, chosen):
            model = nnx.merge(graphdef, params)
            weights = place_one(mesh, chosen)
            return cross_entropy(
                model(own, *arrays[1:]), jax.lax.stop_gradient(model.output()), arrays[0], weights, 257
            )

        def place_one(mesh, chosen):
            weights = jax.nn.one_hot(chosen, LENGTH, dtype=jnp.float32)[None, :] * jnp.ones((ROWS, 1))
            return jax.reshard(weights, TOKENS)

        gradient = jax.jit(jax.grad(loss))
        for chosen in (0, 7, 19, 25):
            by_token = np.abs(gradient(params, jnp.int32(chosen))["embedding"][...]).sum(axis=1)[:LENGTH]
            first = 20 if chosen >= 20 else 0
            assert (by_token[first : chosen + 1] > 0).all()
            assert not by_token[:first].any()
            assert not by_token[chosen + 1 :].any()


def test_parameters_lie_in_pieces_and_do_not_depend_on_the_mesh(make_mesh):
    states: list[Any] = []
    for mesh in (make_mesh(), make_mesh(2, 2, 2)):
        with jax.set_mesh(mesh):
            states.append(jax.jit(lambda: nnx.state(make()))())
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))
    attention_part = states[1]["layers"]["attention"]
    assert attention_part["query"][...].sharding.spec == P(None, FSDP, TENSOR, None)
    assert attention_part["output"][...].sharding.spec == P(None, TENSOR, None, FSDP)
    embedding = states[1]["embedding"][...]
    assert embedding.shape == (384, 32)
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(192, 8)}


def test_seed_and_tying_change_the_parameters(make_mesh):
    untied = replace(SMALL, tied=False)
    with jax.set_mesh(make_mesh()):
        one, other, more = (nnx.state(model) for model in (make(), make(seed=1), make(untied)))
        assert not jax.tree.all(jax.tree.map(np.array_equal, one, other))
    assert count_parameters(more) == count_parameters(one) + 384 * 32
    layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 64 + 2 * 32
    assert count_parameters(one) == 2 * layer + 32 + 384 * 32


@pytest.mark.parametrize("graph", [True, False])
def test_works_in_both_modes_of_nnx(make_mesh, monkeypatch, graph):
    before = flax.config.nnx_graph_mode
    flax.config.update("nnx_graph_mode", graph)
    try:
        mesh = make_mesh(context=2)
        with jax.set_mesh(mesh):
            graphdef, params = nnx.split(make())
            out = jax.jit(lambda params, arrays: nnx.merge(graphdef, params)(*arrays))(params, tokens_on(mesh))
    finally:
        flax.config.update("nnx_graph_mode", before)
    np.testing.assert_allclose(out, hidden_states(make_mesh()), atol=2e-5)


def loss_of(section, params, arrays):
    """A model's mean loss, given its parameters, of predicting each token from itself."""
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(section))), params)
    hidden = model(*arrays)
    weights = jnp.full(arrays[0].shape, 1 / arrays[0].size, jnp.float32, out_sharding=TOKENS)
    return cross_entropy(hidden, model.output(), arrays[0], weights, VOCABULARY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["on", "offload"])
def test_computing_layers_again_changes_no_gradient(make_mesh, monkeypatch, dtype, remat):
    monkeypatch.setattr(transformer, "CHUNK", 5)  # three chunks of a device's 16 tokens, and a rest
    with jax.set_mesh(mesh := make_mesh(data=2, context=2, tensor=2)):
        params, arrays = jax.jit(lambda: nnx.state(make(), nnx.Param))(), tokens_on(mesh)
        kept, again = (
            jax.jit(jax.value_and_grad(partial(loss_of, replace(SMALL, dtype=dtype, remat=each))))(params, arrays)
            for each in ("off", remat)
        )
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(kept[1]))
    rounding = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=rounding * scale, rtol=rounding), kept, again)


@pytest.mark.parametrize("remat", ["off", "on", "offload"])
def test_a_layer_turns_its_kv_twice(make_mesh, remat):
    with jax.set_mesh(mesh := make_mesh(context=4)):
        params, arrays = nnx.state(make(), nnx.Param), tokens_on(mesh)
        unit = (ROWS, SMALL.kv_heads, LENGTH // 4, SMALL.head_dim), "float32"
        sent = permuted(jax.grad(partial(loss_of, replace(SMALL, remat=remat))), params, arrays)
    # A layer's K and V: three hops forward, three backward, and three of their gradients.
    assert sent[unit] == SMALL.layers * 2 * (3 + 3 + 3)


def test_layers_computed_again_keep_their_input_and_attentions_result_alone(make_mesh):
    length, wide = 4096, replace(SMALL, feed_forward=256)

    def temporaries(section: config.Model, layers: int) -> int:
        section = replace(section, layers=layers)
        gradient = jax.jit(jax.grad(partial(loss_of, section)))
        params = jax.eval_shape(lambda: nnx.state(make(section), nnx.Param))
        found: Any = gradient.lower(params, arrays).compile().memory_analysis()
        return found.temp_size_in_bytes

    with jax.set_mesh(mesh := make_mesh()):
        sharding = jax.NamedSharding(mesh, TOKENS)
        arrays = [jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)] * 3
        again, kept = ((temporaries(c, 12) - temporaries(c, 4)) / 8 for c in (replace(wide, remat="on"), wide))
    kept_alone = 4 * length * (wide.dim + wide.heads * wide.head_dim + wide.heads)
    weights = 4 * (wide.dim * wide.head_dim * (2 * wide.heads + 2 * wide.kv_heads) + 3 * wide.dim * wide.feed_forward)
    assert again < 1.05 * kept_alone + 2 * weights
    assert kept > 3 * kept_alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_device_holds_more_whole_weights_than_one_layers(make_mesh, dtype):
    section = replace(SMALL, layers=12, dim=256, feed_forward=1024, dtype=dtype)
    with jax.set_mesh(mesh := make_mesh(context=8)):
        params = jax.eval_shape(lambda: nnx.state(make(section), nnx.Param))
        arrays = [jax.ShapeDtypeStruct((1, 64), jnp.int32, sharding=jax.NamedSharding(mesh, TOKENS))] * 3
        found: Any = jax.jit(jax.grad(partial(loss_of, section))).lower(params, arrays).compile().memory_analysis()
    layer = 4 * 3 * section.dim * section.feed_forward
    pieces = 12 * layer / 8
    assert found.temp_size_in_bytes < 4 * layer + 3 * pieces < 12 * layer


def test_the_program_does_not_grow_with_depth(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=2)):
        arrays = tokens_on(mesh)

        def size(layers: int) -> int:
            section = replace(SMALL, layers=layers)
            params = jax.eval_shape(lambda: nnx.state(make(section), nnx.Param))
            return len(jax.jit(jax.grad(partial(loss_of, section))).lower(params, arrays).as_text())

        assert size(16) < 1.02 * size(2)


def test_the_tables_gradient_is_summed_in_float32(make_mesh):
    """A token that comes 4,096 times: in bfloat16 its gradient would stop to grow at 256."""
    with jax.set_mesh(mesh := make_mesh(data=2, context=2, tensor=2)):
        table = place(np.ones((128, 32), np.float32), mesh, P(TENSOR, FSDP))
        tokens = place(np.full((4, 1024), 70, np.int32), mesh, TOKENS)
        gradient = jax.jit(jax.grad(lambda t: jnp.sum(transformer.embed(tokens, t, "bfloat16").astype(jnp.float32))))
        found = np.asarray(gradient(table))
    np.testing.assert_array_equal(found, 4096.0 * (np.arange(128) == 70)[:, None] * np.ones((1, 32)))
