"""Continuations: the prompt is kept, and each token is sampled from the logits at the preceding token."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import attention, config
from ringattn.data import Batch
from ringattn.data.placement import permute_and_place
from ringattn.data.tokenizer import ByteTokenizer
from ringattn.mesh.axes import SEQUENCE, abstract
from ringattn.model.transformer import Transformer
from ringattn.training.samples import as_text, continue_rows, make_next_logits

VOCABULARY = 257
SMALL = config.Model(layers=1, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=32, final_soft_cap=0.1)


def batch(length: int = 16) -> Batch:
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) * 7 % VOCABULARY
    positions = np.concatenate([np.arange(5), np.arange(length - 5)]).astype(np.int32)
    segments = np.repeat([0, 1], [5, length - 5]).astype(np.int32)
    rows = [np.stack([x, x]) for x in (positions, segments)]
    return Batch(tokens, tokens, rows[0], rows[1], np.ones_like(tokens, np.float32))


def test_each_token_is_sampled_from_the_logits_of_the_token_before():
    prompts, selected = batch(), []

    def successor(rows: Batch, one_hot):
        assert (one_hot.sum(1) == 1).all()
        index = int(one_hot[0].argmax())
        np.testing.assert_array_equal(rows.positions[:, index], index)
        selected.append(index)
        assert (rows.segment_ids[:, index] == 0).all()
        following = (rows.tokens[:, index] + 1) % VOCABULARY
        return 1e4 * (np.arange(VOCABULARY)[None] == following[:, None])

    sampled = continue_rows(prompts, 4, seed=0, next_logits=successor)
    np.testing.assert_array_equal(sampled[:, :4], prompts.tokens[:, :4])
    np.testing.assert_array_equal(np.diff(sampled[:, 3:].astype(int)) % VOCABULARY, 1)
    assert selected == list(range(3, 15))
    np.testing.assert_array_equal(prompts.tokens, batch().tokens)  # the batch is not modified


def model_factory(layout):
    """The model's output logits have a soft cap, which its embedding, drawn with deviation 0.02, would not reach."""
    attend = partial(attention, axis=SEQUENCE, layout=layout)
    return lambda: Transformer(SMALL, VOCABULARY, attend, nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def one_device(make_mesh):
    """Parameters, and the model's logits [B, L, V] of `batch`, computed on one device."""
    rows, make_model = batch(), model_factory("contiguous")
    with jax.set_mesh(make_mesh()):
        graphdef, params = nnx.split(jax.jit(make_model)())
        run = jax.jit(lambda params, *ids: nnx.merge(graphdef, params).logits(*ids))
        return jax.device_get((params, run(params, rows.tokens, rows.positions, rows.segment_ids)))


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("contiguous", {}),
        ("contiguous", {"context": 4}),
        ("zigzag", {"context": 4}),
        ("zigzag", {"data": 2, "context": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_next_logits_agree_with_the_model_on_every_mesh(one_device, make_mesh, layout, sizes):
    (params, logits), rows, make_model = one_device, batch(), model_factory(layout)
    one_hot = np.zeros((2, 16), np.float32)
    one_hot[:, 9] = 1
    with jax.set_mesh(mesh := make_mesh(**sizes)):
        like = abstract(jax.eval_shape(lambda: nnx.split(make_model())[1]), mesh)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, like)
        arrays = permute_and_place((rows.tokens, rows.positions, rows.segment_ids, one_hot), mesh, layout)
        next_logits = make_next_logits(make_model, VOCABULARY)(placed, *arrays)
    chex.assert_shape(next_logits, (2, VOCABULARY))
    np.testing.assert_allclose(next_logits, logits[:, 9], rtol=1e-4, atol=1e-5)


def test_text_shows_prompt_and_continuation():
    tokens = np.frombuffer(b"def f(): return 1", np.uint8).astype(np.int32)[None]
    assert as_text(tokens, 8, ByteTokenizer()) == "=== 1: prompt\ndef f():\n--- model continuation\n return 1\n"
