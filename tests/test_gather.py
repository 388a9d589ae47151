import jax
import jax.numpy as jnp
import pytest
from wire import transfers

from ringattn import attention


@pytest.mark.parametrize("given", [False, True], ids=["implied", "given"])
def test_keys_are_gathered_once_forward_and_their_gradients_scattered_back(make_mesh, given):
    def f(query, key, value, tokens):
        return attention(query, key, value, **tokens, strategy="gather").astype(jnp.float32).sum()

    with jax.set_mesh(mesh := make_mesh(context=4)):
        sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
        shapes = [(1, 64, heads, 8) for heads in (4, 2, 2)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        tokens = {"segment_ids": jax.ShapeDtypeStruct((1, 64), jnp.int32, sharding=sharding)} if given else {}
        forward = [each for each in transfers(f, *arrays, tokens) if each.dtype == "bfloat16"]
        both = transfers(jax.grad(f, (0, 1, 2)), *arrays, tokens)
    assert [each.shape for each in forward] == [(1, 2, 16, 8)] * 2
    assert {each.primitive for each in forward} == {"all_gather"}
    back = [(each.shape, each.dtype) for each in both if each.primitive == "reduce_scatter"]
    assert back == [((1, 2, 64, 8), "float32")] * 2
    assert len([each for each in both if each.dtype == "bfloat16"]) == 4  # K and V, forward and backward
    assert not [each for each in both if each.primitive == "ppermute"]
    ids = [each.shape for each in both if each.dtype == "int32"]
    assert ids == [(1, 16)] * 2 * given  # the documents', once forward and once backward; positions are implied
