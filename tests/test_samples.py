"""Samples: beginnings of held-out documents, each continued by the model."""

import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import config
from ringattn.data import Batch
from ringattn.data.tokenizer import ByteTokenizer
from ringattn.generation import Generator
from ringattn.training.samples import NEW_TOKENS, PROMPT_TOKENS, beginnings, sample
from ringattn.weights.loaded import make_model

SMALL = config.Model(layers=1, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=32, vocabulary=400)
"""Its vocabulary is larger than the tokenizer's."""
LENGTH = 48


def rows(*documents: int, length: int = LENGTH) -> Batch:
    """Rows of text with documents of these lengths, and one that fills the row."""
    tokens = np.stack([np.frombuffer(b"the lazy dog. " * length, np.uint8)[:length]] * 4).astype(np.int32)
    starts = np.cumsum([0, *documents])
    segments = np.searchsorted(starts, np.arange(length), side="right").astype(np.int32) - 1
    positions = (np.arange(length) - starts[segments]).astype(np.int32)
    ids = [np.stack([x] * 4) for x in (positions, segments)]
    return Batch(tokens, tokens, ids[0], ids[1], np.ones_like(tokens, np.float32))


@pytest.mark.parametrize(
    ("length", "documents", "size"), [(48, (), 30), (48, (16,), 10), (9, (1,), 1), (1, (), 1), (2048, (), 160)]
)
def test_a_prompt_is_the_beginning_of_a_document(length, documents, size):
    prompts = beginnings(rows(*documents, length=length))
    assert [prompt.tobytes() for prompt in prompts] == [rows(length=length).tokens[0, :size].tobytes()] * 3
    assert size <= PROMPT_TOKENS < PROMPT_TOKENS + NEW_TOKENS
    given = rows(*documents, length=length)
    joined = given._replace(positions=np.tile(np.arange(length, dtype=np.int32), (4, 1)), segment_ids=None)
    assert {prompt.tobytes() for prompt in beginnings(joined)} == {p.tobytes() for p in beginnings(rows(length=length))}


def test_samples_are_the_same_on_every_mesh_and_of_the_tokenizers_ids(make_mesh, monkeypatch):
    generate, answers, texts = Generator.generate, [], []
    monkeypatch.setattr(Generator, "generate", lambda *a, **k: answers.append(generate(*a, **k)) or answers[-1])
    for sizes in {}, {"data": 2, "context": 2, "tensor": 2}:
        with jax.set_mesh(mesh := make_mesh(**sizes)):
            params = jax.jit(lambda: nnx.split(make_model(SMALL)())[1])()
            texts.append(sample(SMALL, params, mesh, ByteTokenizer(), rows(16), seed=1, after_token=lambda: None))
    assert texts[0] == texts[1]
    assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]]
    ids = np.concatenate([answer.tokens for answer in answers[0]])
    assert ids.size > LENGTH - 10
    assert ids.max() < ByteTokenizer().size
    prompt = "=== {}: prompt\nthe lazy d\n--- model continuation\n"
    assert texts[0] == "".join(prompt.format(n) + answer.text + "\n" for n, answer in enumerate(answers[0], 1))
