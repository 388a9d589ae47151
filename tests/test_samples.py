"""Continuations: the prompt stays, each token comes from the logits of the one before it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringattn import attention, config, permute
from ringattn.data import Batch
from ringattn.data.tokenizer import ByteTokenizer
from ringattn.mesh import SEQUENCE, TOKENS, place
from ringattn.model import Transformer
from ringattn.training.samples import as_text, continue_rows, make_next_logits

VOCABULARY = 257


def batch(length: int = 16) -> Batch:
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) * 7 % VOCABULARY
    positions = np.concatenate([np.arange(5), np.arange(length - 5)]).astype(np.int32)
    segments = np.repeat([0, 1], [5, length - 5]).astype(np.int32)
    rows = [np.stack([x, x]) for x in (positions, segments)]
    return Batch(tokens, tokens, rows[0], rows[1], np.ones_like(tokens, np.float32))


def test_each_token_follows_from_the_one_before():
    given, asked = batch(), []

    def successor(rows: Batch, here):
        assert (here.sum(1) == 1).all()
        at = int(here[0].argmax())
        np.testing.assert_array_equal(rows.positions[:, at], at)
        asked.append(at)
        assert (rows.segment_ids[:, at] == 0).all()
        wanted = (rows.tokens[:, at] + 1) % VOCABULARY
        return 1e4 * (np.arange(VOCABULARY)[None] == wanted[:, None])

    made = continue_rows(given, 4, seed=0, next_logits=successor)
    np.testing.assert_array_equal(made[:, :4], given.tokens[:, :4])
    np.testing.assert_array_equal(np.diff(made[:, 3:].astype(int)) % VOCABULARY, 1)
    assert asked == list(range(3, 15))
    np.testing.assert_array_equal(given.tokens, batch().tokens)  # the batch itself is left alone


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_logits_are_the_models_on_any_mesh(make_mesh, layout):
    c = config.Model(layers=1, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=32)
    given, results = batch(), []
    here = np.zeros((2, 16), np.float32)
    here[:, 9] = 1
    for sizes in ({}, {"context": 4}, {"data": 2, "context": 2, "tensor": 2}):
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):

            def make_model():
                return Transformer(c, VOCABULARY, partial(attention, axis=SEQUENCE, layout=layout), nnx.Rngs(params=0))

            params = jax.jit(lambda make=make_model: nnx.split(make())[1])()
            arrays = [permute(x, layout, mesh.shape["context"]) for x in (*given[:1], *given[2:4], here)]
            results.append(np.asarray(make_next_logits(make_model, VOCABULARY)(params, *place(arrays, mesh, TOKENS))))
            if not sizes:
                model = make_model()
                hidden = model(*(jnp.asarray(x) for x in (given.tokens, given.positions, given.segment_ids)))
                wanted = np.asarray(hidden)[:, 9] @ np.asarray(model.embedding[...])[:VOCABULARY].T
    for logits in results:
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)


def test_text_shows_what_was_given_and_what_was_made():
    tokens = np.frombuffer(b"def f(): return 1", np.uint8).astype(np.int32)[None]
    assert as_text(tokens, 8, ByteTokenizer()) == "=== 1: given\ndef f():\n--- and made of it\n return 1\n"
