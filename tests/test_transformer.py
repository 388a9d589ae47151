from dataclasses import replace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from ringattn import attention, config
from ringattn.mesh import FSDP, TENSOR, TOKENS, place
from ringattn.model import Transformer, count_parameters
from ringattn.training.loss import cross_entropy

VOCABULARY = 257
ROWS, LENGTH = 4, 32
SMALL = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64)


def make(section=SMALL, seed=0):
    return Transformer(section, VOCABULARY, attention, nnx.Rngs(params=seed))


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
    attention_part = states[1]["layers"][1]["attention"]
    assert attention_part["query"][...].sharding.spec == P(FSDP, TENSOR, None)
    assert attention_part["output"][...].sharding.spec == P(TENSOR, None, FSDP)
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
