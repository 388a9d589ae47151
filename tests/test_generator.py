"""The generator: against recomputing the whole sequence, with any mesh, chunk, batch and cache."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from ringattn import config
from ringattn.data.placement import permute_and_place
from ringattn.data.tokenizer import ByteTokenizer
from ringattn.generation import Conversation, Generator, decode, prefill
from ringattn.generation import cache as caches
from ringattn.generation.prompts import Texts
from ringattn.generation.sampling import Sampling, choose
from ringattn.generation.served import Served
from ringattn.mesh.axes import DATA, place
from ringattn.planning.decoding import lower_decode
from ringattn.weights.loaded import Loaded, make_model
from ringattn.weights.source import Details

VOCABULARY = 257
SHAPE: dict[str, Any] = {
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "feed_forward": 48,
    "vocabulary": VOCABULARY,
}
GEMMA3 = config.Model(family="gemma3", layers=3, window=9, pattern=("window", "full"), soft_cap=5.0, **SHAPE)
SMALL = replace(GEMMA3, layers=2)
QWEN2 = config.Model(
    family="qwen2", layers=2, tied=False, rope_scaling="yarn", rope_factor=2.0, rope_original=64, **SHAPE
)
QWEN3 = config.Model(family="qwen3", layers=2, **SHAPE)
TEXTS = Texts.of_tokenizer(ByteTokenizer(), VOCABULARY, frozenset(), rows=True)
PROMPTS = ["The quick brown fox jumps over the lazy dog, twice.", "A", "Once upon a time there was"]


@lru_cache
def params_of(model: config.Model, mesh: jax.sharding.Mesh):
    """Random parameters, the same on every mesh, with large logits, so that the most likely token is a clear one."""
    with jax.set_mesh(mesh):
        make = make_model(model)
        params = jax.jit(lambda: nnx.split(make())[1])()
        return jax.jit(lambda params: jax.tree.map(lambda x: 3 * x, params))(params)


def make_generator(mesh: jax.sharding.Mesh, model: config.Model = SMALL, **options) -> Generator:
    options = {"cache_tokens": 512, "cache_dtype": "float32", "chunk": 16} | options
    return Generator.of(model, params_of(model, mesh), mesh, TEXTS, **options)


@pytest.fixture(scope="module")
def generator(make_mesh) -> Generator:
    return make_generator(make_mesh(context=4))


def check_against_recomputing(generator: Generator, prompts: list, results: list) -> None:
    """Every token is the most likely one after all before it, by the forward pass of training."""
    engine = generator.served.engine
    loaded = Loaded(Path("."), engine.config, engine.mesh, engine.params, Details(512))
    rows = [np.concatenate([generator.served.texts.ids(p), r.tokens]) for p, r in zip(prompts, results, strict=True)]
    tokens = np.zeros((len(rows), max(row.size for row in rows)), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : row.size] = row
    log_probs = np.asarray(jax.nn.log_softmax(loaded.logits(tokens)))
    for number, (row, result) in enumerate(zip(rows, results, strict=True)):
        before = np.arange(row.size - len(result.tokens) - 1, row.size - 1)
        np.testing.assert_array_equal(log_probs[number, before].argmax(-1), result.tokens)
        found = log_probs[number, before, np.array(result.tokens)]
        np.testing.assert_allclose(result.log_probs, found, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "sizes", "options"),
    [
        (GEMMA3, {"data": 2, "context": 4}, {"chunk": 16}),
        (QWEN2, {"context_outer": 2, "context": 2, "tensor": 2}, {"chunk": 64}),
        (QWEN3, {"context": 2}, {"chunk": 64}),
    ],
    ids=["gemma3", "qwen2", "qwen3"],
)
def test_greedy_answers_are_those_of_recomputing_all(make_mesh, model, sizes, options):
    generator = make_generator(make_mesh(**sizes), model, **options)
    results = generator.generate(PROMPTS, max_tokens=24)
    assert [len(result.tokens) for result in results] == [24] * 3 or any(r.finish == "stop" for r in results)
    check_against_recomputing(generator, PROMPTS, results)


def test_answers_do_not_depend_on_mesh_chunk_or_batch(make_mesh, generator):
    """The batch is that of the test above."""
    [sharded] = generator.generate(PROMPTS[:1], max_tokens=12)
    [whole] = make_generator(make_mesh(), chunk=64).generate(PROMPTS[:1], max_tokens=12)
    assert whole.tokens == sharded.tokens
    np.testing.assert_allclose(whole.log_probs, sharded.log_probs, atol=1e-4)


def test_few_programs_serve_all_lengths(make_mesh, monkeypatch):
    monkeypatch.setattr("ringattn.generation.programs.decode", chex.assert_max_traces(decode.decode, n=2))
    monkeypatch.setattr("ringattn.generation.programs.prefill", chex.assert_max_traces(prefill.prefill, n=4))
    generator = make_generator(make_mesh(), replace(SMALL, head_dim=4), chunk=64)
    for length in (1, 5, 17, 40, 64, 100, 180, 250):  # 250 + 10 tokens: the cache grows from 256 to 512
        generator.generate([list(range(length))], max_tokens=10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_have_the_highest_precision(make_mesh, dtype):
    """By default TPUs round float32 operands to bfloat16, and GPUs to TF32."""
    with jax.set_mesh(mesh := make_mesh(context=2)):
        engine = make_generator(mesh, dtype=dtype, cache_dtype=dtype).served.engine
        cache = caches.empty(engine.config, 1, 64, dtype, mesh)
        bounds = [place(np.full(1, end, np.int32), mesh, P(DATA)) for end in (0, 0, 16)]
        chunk = prefill.Chunk(*permute_and_place([np.zeros((1, 16), np.int32)], mesh, "striped"), *bounds)
        programs = [
            engine.programs.extend.lower(engine.params, cache, None, chunk),
            lower_decode(replace(SMALL, dtype=dtype), mesh, 64, dtype)[0],
        ]
    for program in programs:
        products = re.findall(r"stablehlo.dot_general.*", program.as_text())
        assert len(products) >= 8
        highest = [product for product in products if "precision = [HIGHEST, HIGHEST]" in product]
        if dtype == "float32":
            assert highest == products
        else:
            assert not [product for product in highest if "bf16" in product]


def test_a_cache_is_saved_and_loaded_on_another_mesh(make_mesh, generator, tmp_path):
    # An empty question: the answer to the document itself.
    document, questions = "A long document. " * 4, ["", "What was it?"]
    fresh = generator.generate([document + question for question in questions], max_tokens=8)
    cache = generator.prefill(document)
    asked = generator.generate(questions, max_tokens=8, cache=cache)
    cache.save(tmp_path / "cache")
    other = make_generator(make_mesh(data=2, context=2))
    loaded = other.load_cache(tmp_path / "cache")
    for results in (asked, other.generate(questions, max_tokens=8, cache=loaded)):
        assert [result.tokens for result in results] == [result.tokens for result in fresh]
    stores = cache.cache.stores
    assert (stores["full"].key.shape[3], stores["window"].key.shape[3]) == (256, 12)  # 9 + 2 tokens on 4 devices


def test_a_damaged_or_foreign_cache_is_refused(make_mesh, generator, tmp_path):
    saved = tmp_path / "cache"
    generator.prefill("A document").save(saved)
    with pytest.raises(ValueError, match="is not empty; use a new directory"):
        generator.prefill("A document").save(saved)
    for other, message in {
        make_generator(make_mesh(), replace(SMALL, window=8)): "is the cache of another model",
        make_generator(make_mesh(), cache_dtype="int8"): "has dtype 'float32', not cache_dtype='int8'",
        make_generator(make_mesh(), cache_tokens=8): "has 11 tokens, more than cache_tokens=8",
    }.items():
        with pytest.raises(ValueError, match=message):
            other.load_cache(saved)
    with pytest.raises(ValueError, match="the cache belongs to another model"):
        make_generator(make_mesh(), replace(SMALL, window=8)).generate(["a"], cache=generator.prefill("b"))
    content = (saved / "cache.bin").read_bytes()
    for damaged in (content[:-1], content[:7] + b"\x01" + content[8:]):
        (saved / "cache.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: its SHA-256"):
            generator.load_cache(saved)
    (saved / "cache.bin").write_bytes(content)
    intact = json.loads((saved / "cache.json").read_text())
    for token, problem in ((intact["tokens"][1] ^ 1, "is damaged: its SHA-256"), (True, "has another format")):
        changed = intact | {"tokens": [intact["tokens"][0], token, *intact["tokens"][2:]]}
        (saved / "cache.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=problem):
            generator.load_cache(saved)
    (saved / "cache.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="has another format; prefill the prompt again"):
        generator.load_cache(saved)
    for missing in (saved / "cache.json", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="is not a directory"):
            generator.load_cache(missing)


def test_prompts_that_begin_alike_share_their_beginning(generator, monkeypatch):
    beginning = "All prompts begin with these words, which are prefilled once. "
    prompts = [beginning + "One", beginning + "Another", beginning + "O"]
    prefilled = []
    original = Served.prefill
    monkeypatch.setattr(Served, "prefill", lambda self, x, *a: prefilled.append(x.size) or original(self, x, *a))
    together = generator.generate(prompts, max_tokens=6)
    assert prefilled == [1 + len(beginning)]
    alone = [generator.generate([prompt], max_tokens=6)[0] for prompt in prompts]
    assert [result.tokens for result in together] == [result.tokens for result in alone]


def test_log_probabilities_of_large_logits_are_exact():
    logits = 5 * np.random.default_rng(0).standard_normal((4, 1000)) + 500
    tokens, log_probs = choose(jnp.asarray(logits, jnp.float32), None, None, Sampling().values(1000))
    rounded = logits.astype(np.float32).astype(np.float64)
    exact = rounded.max(1) - np.log(np.exp(rounded - 500).sum(1)) - 500
    np.testing.assert_array_equal(tokens, rounded.argmax(1))
    np.testing.assert_allclose(log_probs, exact, atol=1e-6)


def test_samples_depend_on_the_seed_and_not_on_the_batch(generator):
    options = {"max_tokens": 10, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
    first, second = generator.generate(["a"], samples=2, **options)
    assert first.tokens != second.tokens
    again, _ = generator.generate(["a", "b"], **options)
    assert again.tokens == first.tokens
    other, _ = generator.generate(["a"], samples=2, seed=1, **options)
    assert other.tokens != first.tokens


def test_scores_are_those_of_the_whole_sequence(generator):
    pairs = [(PROMPTS[0], " and it barked"), ("A", "bc"), (PROMPTS[2], " a")]
    engine = generator.served.engine
    loaded = Loaded(Path("."), engine.config, engine.mesh, engine.params, Details(512))
    for (prompt, continuation), (scores, greedy) in zip(pairs, generator.scores(pairs), strict=True):
        context, rest = generator.served.texts.ids(prompt), generator.served.texts.ids(continuation, continues=True)
        tokens = np.concatenate([context, rest])
        padded = np.pad(tokens, (0, 80 - tokens.size))
        log_probs = np.asarray(jax.nn.log_softmax(loaded.logits(padded[None])[0]))
        before = np.arange(context.size - 1, tokens.size - 1)
        np.testing.assert_allclose(scores, log_probs[before, rest], atol=1e-4)
        assert greedy == (log_probs[before].argmax(-1) == rest).all()
    cache = generator.prefill(PROMPTS[0])
    np.testing.assert_allclose(generator.score("", " and", cache=cache), generator.score(PROMPTS[0], " and"), atol=1e-5)


def test_streams_are_the_answers(generator):
    [result] = generator.generate(PROMPTS[:1], max_tokens=20)
    assert "".join(generator.stream(PROMPTS[0], max_tokens=20)) == result.text
    stop = result.text[6:9]
    expected = result.text[: result.text.index(stop)]
    [stopped] = generator.generate(PROMPTS[:1], max_tokens=20, stop=[stop])
    assert (stopped.text, stopped.finish) == (expected, "stop")
    assert "".join(generator.stream(PROMPTS[0], max_tokens=20, stop=[stop])) == expected
    [ended] = generator.generate(PROMPTS[:1], max_tokens=20, stop=[result.tokens[3]])
    assert ended.tokens == result.tokens[: result.tokens.index(result.tokens[3]) + 1]
    assert ended.finish == "stop"


def test_a_conversation_keeps_its_turns_in_the_cache(generator):
    conversation = Conversation(generator.served)
    first = "".join(conversation.answer(PROMPTS[0], max_tokens=7))
    length = conversation.tokens.size
    second = "".join(conversation.answer(" And then?", max_tokens=7))
    turns = np.concatenate([conversation.tokens[:length], generator.served.texts.ids(" And then?", continues=True)])
    assert second == generator.generate([turns], max_tokens=7)[0].text
    assert first == generator.generate(PROMPTS[:1], max_tokens=7)[0].text


def test_an_interrupted_conversation_goes_on(generator):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    conversation, undisturbed = Conversation(generator.served), Conversation(generator.served)
    assert "".join(conversation.answer("One", max_tokens=4)) == "".join(undisturbed.answer("One", max_tokens=4))
    with pytest.raises(KeyboardInterrupt):
        next(conversation.answer(" never asked", advance=interrupt))
    early = conversation.answer(" Two", max_tokens=4)
    next(early)
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(conversation.answer(""))
    expected = "".join(undisturbed.answer(" Two", max_tokens=1)) + "".join(undisturbed.answer(" Three", max_tokens=4))
    assert "".join(conversation.answer(" Three", max_tokens=4)) in expected
    with pytest.raises(ValueError, match="a later answer of this conversation has begun"):
        next(early)
    np.testing.assert_array_equal(conversation.tokens, undisturbed.tokens)


def test_a_cache_in_int8_changes_little(make_mesh, generator):
    small = make_generator(make_mesh(context=4), cache_dtype="int8")
    exact, found = (each.score(*PROMPTS[:2]) for each in (generator, small))
    assert 0 < np.abs(exact - found).mean() < 0.15
    caches = [each.prefill(PROMPTS[0]).bytes_per_device for each in (generator, small)]
    assert caches[1] / caches[0] == (1 + 2 / 8) / 4  # one byte per element, and one bfloat16 per 8


def test_a_new_token_moves_no_keys_or_values(make_mesh):
    mesh = make_mesh(context=8)
    found = []
    for tokens in (8192, 65_536):
        with jax.set_mesh(mesh):
            compiled = lower_decode(SMALL, mesh, tokens)[0].compile()
        lines = re.findall(r"= (\S+) (all-\w+|collective-permute|reduce-scatter)[\w-]*\(", compiled.as_text())
        found.append(sorted(lines))
        local = 2 * 2 * tokens // 8 * 8 * 2  # bytes of K and V of the layer without a window
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        assert temporaries < 12 * local + 2**20, (temporaries, local)  # logits and float32 copies of one layer
    assert found[0] == found[1]
    assert not [line for line in found[0] if line[1] != "all-reduce"]


def test_wrong_arguments_raise_one_line(generator, unchecked):
    cases = [
        ({"prompts": "text"}, "must be a list of prompts"),
        ({"prompts": [""]}, "the prompt is empty"),
        ({"prompts": [[]]}, "the prompt is empty"),
        ({"prompts": [[257]]}, "token id 257 must be from 0 to 256"),
        ({"prompts": [[0.5]]}, "must be a text, or a list of ids"),
        ({"prompts": ["\ud800"]}, "is not valid Unicode at character 0"),
        (
            {"prompts": ["a" * 500]},
            "a prompt of 501 tokens and an answer of max_tokens=256 do not fit cache_tokens=512",
        ),
        ({"max_tokens": 0}, "max_tokens=0 must be an int from 1"),
        ({"samples": 0}, "samples=0 must be"),
        ({"temperature": -1.0}, r"temperature=-1.0 must be from 0 \(greedy\)"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_k": 0}, "top_k=0 must be an int of at least 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be more than 0 and at most 1"),
        ({"min_p": 0}, "min_p=0 must be"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"stop": "."}, r"use \['.'\]"),
        ({"stop": [""]}, "would end every answer at once"),
        ({"stop": [999]}, "stop: 999 must be from 0 to 256"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            generator.generate(**{"prompts": ["a"], **options})
    with pytest.raises(ValueError, match="the continuation is empty"):
        generator.score("a", "")
    with pytest.raises(ValueError, match="cache_dtype='int4' must be one of float32, bfloat16, int8"):
        Generator.load("anywhere", cache_dtype="int4")
    with pytest.raises(ValueError, match="cache_tokens=0 must be"):
        Generator.load("anywhere", cache_tokens=0)
