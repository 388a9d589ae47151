"""The transfers of the gather strategy."""

import jax
import jax.numpy as jnp
import pytest
from wire import transfers

from ringattn import attention


@pytest.mark.parametrize("with_ids", [False, True], ids=["no ids", "segment_ids"])
def test_forward_gathers_kv_once_and_backward_scatters_their_gradients(make_mesh, with_ids):
    def f(query, key, value, tokens):
        return attention(query, key, value, **tokens, strategy="gather").astype(jnp.float32).sum()

    with jax.set_mesh(mesh := make_mesh(context=4)):
        sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
        shapes = [(1, 64, heads, 8) for heads in (4, 2, 2)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        tokens = {"segment_ids": jax.ShapeDtypeStruct((1, 64), jnp.int32, sharding=sharding)} if with_ids else {}
        forward = [sent for sent in transfers(f, *arrays, tokens) if sent.dtype == "bfloat16"]
        both = transfers(jax.grad(f, (0, 1, 2)), *arrays, tokens)
    assert [sent.shape for sent in forward] == [(1, 2, 16, 8)] * 2
    assert {sent.primitive for sent in forward} == {"all_gather"}
    back = [(sent.shape, sent.dtype) for sent in both if sent.primitive == "reduce_scatter"]
    assert back == [((1, 2, 64, 8), "float32")] * 2
    assert len([sent for sent in both if sent.dtype == "bfloat16"]) == 4  # K and V, forward and backward
    assert not [sent for sent in both if sent.primitive == "ppermute"]
    ids = [sent.shape for sent in both if sent.dtype == "int32"]
    assert ids == [(1, 16)] * 2 * with_ids  # segments, once forward and once backward; positions are implied
