"""Families agree with a plain reference: logits, loss and gradients on a zigzag ring, with packed documents.

The reference has its own table of what each family does. It computes dense attention layer by layer, with parameters
that are all random, also those that are initialized to 0 or 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringattn import config, unpermute
from ringattn.attn.mask import Mask
from ringattn.config.choices import FamilyName
from ringattn.data import Batch
from ringattn.data.placement import permute_and_place
from ringattn.mesh.axes import abstract, context_shards
from ringattn.model.build import make_forward, model_factory
from ringattn.model.families import (
    FAMILIES,
    attention_soft_cap,
    layer_kinds,
    layer_mask,
    layer_pattern,
    output_soft_cap,
)
from ringattn.model.loss import cross_entropy
from ringattn.model.parallel import all_logits
from ringattn.model.transformer import RMSNorm
from ringattn.training.optimizer import optimizer

VOCABULARY, ROWS, LENGTH = 50, 2, 32
TOLERANCE = 2e-5
SMALL = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


@dataclass(frozen=True)
class Recipe:
    """Settings of the reference. Windows and RoPE bases: one per layer."""

    windows: tuple[int | None, ...]
    thetas: tuple[float, ...]
    bias: bool = False
    qk_norm: bool = False
    scale_offset: int = 0
    post_norms: bool = False
    embedding_scale: float = 1.0
    activation: Callable[..., Any] = silu
    query_scale: float = 8**-0.5
    soft_cap: float | None = None
    final_soft_cap: float | None = None
    epsilon: float = 1e-6


GEMMA = {"scale_offset": 1, "post_norms": True, "embedding_scale": 32**0.5, "activation": gelu}
CASES: dict[FamilyName, tuple[config.Model, Recipe]] = {
    "llama": (replace(SMALL, norm_epsilon=1e-2), Recipe((None, None), (1e4, 1e4), epsilon=1e-2)),
    "mistral": (replace(SMALL, family="mistral", window=5), Recipe((5, 5), (1e4, 1e4))),
    "qwen2": (
        replace(SMALL, family="qwen2", tied=False, rope_theta=1e3),
        Recipe((None, None), (1e3, 1e3), bias=True),
    ),
    "qwen3": (replace(SMALL, family="qwen3"), Recipe((None, None), (1e4, 1e4), qk_norm=True)),
    "gemma2": (
        # Small caps, which the logits exceed.
        replace(SMALL, family="gemma2", layers=5, window=4, query_scale=0.4, soft_cap=0.8, final_soft_cap=1.5),
        Recipe((4, None, 4, None, 4), (1e4,) * 5, query_scale=0.4, soft_cap=0.8, final_soft_cap=1.5, **GEMMA),
    ),
    "gemma3": (
        replace(
            SMALL,
            family="gemma3",
            layers=7,
            window=4,
            pattern=("window", "window", "full"),
            rope_theta=1e6,
            rope_local_theta=1e2,
        ),
        Recipe((4, 4, None, 4, 4, None, 4), (1e2, 1e2, 1e6, 1e2, 1e2, 1e6, 1e2), qk_norm=True, **GEMMA),
    ),
}
"""A model of each family, and what it must compute."""


def batch() -> Batch:
    """Two rows, of two and three documents."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    starts = [(0, 13), (0, 5, 22)]
    index = np.arange(LENGTH, dtype=np.int32)
    segments = np.stack([np.searchsorted(row, index, side="right") - 1 for row in starts]).astype(np.int32)
    positions = index - np.stack([np.array(row, np.int32)[s] for row, s in zip(starts, segments, strict=True)])
    weights = np.full((ROWS, LENGTH), 1 / (ROWS * LENGTH), np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, weights)


def reference_logits(params: Any, recipe: Recipe, rows: Batch) -> np.ndarray:
    """Logits [B, L, V] of a model with these parameters, by the plain formulas in float64."""

    def norm(x, module, layer: Any = ...):
        scale = module["scale"][layer] + recipe.scale_offset
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + recipe.epsilon) * scale

    def rotate(x, theta):
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
            1j * rows.positions[:, :, None, None] * theta ** (-np.arange(half) / half)
        )
        return np.concatenate([turned.real, turned.imag], -1)

    def capped(logits, cap):
        return logits if cap is None else cap * np.tanh(logits / cap)

    attention, feed_forward = params["layers"]["attention"], params["layers"]["feed_forward"]
    x = params["embedding"][rows.tokens] * recipe.embedding_scale
    assert rows.segment_ids is not None
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    for n, (window, theta) in enumerate(zip(recipe.windows, recipe.thetas, strict=True)):
        y = norm(x, attention["norm"], n)
        q, k, v = (np.einsum("ble,ehd->blhd", y, attention[name][n]) for name in ("query", "key", "value"))
        if recipe.bias:
            q, k, v = (z + attention[f"{name}_bias"][n] for z, name in ((q, "query"), (k, "key"), (v, "value")))
        if recipe.qk_norm:
            q, k = norm(q, attention["query_norm"], n), norm(k, attention["key_norm"], n)
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (np.repeat(z, 2, axis=2) for z in (k, v))  # two query heads per key/value head
        logits = capped(recipe.query_scale * np.einsum("blhd,bmhd->bhlm", q, k), recipe.soft_cap)
        seen = (distance >= 0) & (rows.segment_ids[:, :, None] == rows.segment_ids[:, None])
        seen &= distance <= (LENGTH if window is None else window)
        weights = np.exp(logits) * seen[:, None]
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("blhd,hde->ble", np.einsum("bhlm,bmhd->blhd", weights, v), attention["output"][n])
        x = x + (norm(y, attention["post_norm"], n) if recipe.post_norms else y)
        y = norm(x, feed_forward["norm"], n)
        y = recipe.activation(y @ feed_forward["gate"][n]) * (y @ feed_forward["up"][n]) @ feed_forward["down"][n]
        x = x + (norm(y, feed_forward["post_norm"], n) if recipe.post_norms else y)
    table = params.get("unembedding", params["embedding"])
    return capped(norm(x, params["norm"]) @ table[:VOCABULARY].T, recipe.final_soft_cap)


def reference_loss(params: Any, recipe: Recipe, rows: Batch) -> float:
    logits = reference_logits(params, recipe, rows)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows.targets[..., None], -1)[..., 0]
    return float(np.sum(rows.weights * losses))


def random_params(make_model) -> Any:
    """Random parameters, as an nnx.State of NumPy arrays. Call it under a mesh."""
    random = np.random.default_rng(1)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        width = 1.0 if "embedding" in name else 0.3 if "scale" in name or "bias" in name else leaf.shape[-2] ** -0.5
        return (width * random.standard_normal(leaf.shape)).astype(np.float32) + np.float32("scale" in name)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: nnx.split(make_model())[1]))


def plain(params: Any) -> Any:
    """The parameters as nested dicts of float64 arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))


def factory(c: config.Model):
    return model_factory(config.Config(model=c), VOCABULARY)


def ours(c: config.Model, mesh: jax.sharding.Mesh, params: Any, rows: Batch, gradients: bool):
    """Loss, logits and gradient of the model, on the mesh in zigzag order."""
    with jax.set_mesh(mesh):
        make_model = factory(c)
        forward = make_forward(make_model)
        like = abstract(jax.eval_shape(lambda: nnx.split(make_model())[1]), mesh)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, like)

        def loss(params, rows):
            hidden, output, soft_cap = forward(params, rows)
            value = cross_entropy(hidden, output, rows.targets, rows.weights, VOCABULARY, soft_cap)
            return value, all_logits(hidden, output, soft_cap)[..., :VOCABULARY]

        run = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else lambda *x: (loss(*x), {}))
        given: Any = rows
        arrays: Any = permute_and_place(given, mesh, "zigzag")
        (value, logits), gradient = run(placed, Batch(*arrays))
    logits = unpermute(np.asarray(logits), "zigzag", context_shards(mesh))
    return float(value), logits, plain(jax.device_get(gradient)) if gradients else {}


def relative_error(actual, expected) -> float:
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def parameters(make_mesh):
    """parameters(family): random parameters of the family's model."""

    def get(family: FamilyName) -> Any:
        with jax.set_mesh(make_mesh()):
            return random_params(factory(CASES[family][0]))

    return get


def slopes(params: Any, recipe: Recipe, direction: Any) -> Any:
    """Derivative of the reference's loss along the direction of each parameter, by central differences."""
    leaves, treedef = jax.tree.flatten(params)
    found = []
    for n, step in enumerate(jax.tree.leaves(direction)):
        near = [
            reference_loss(
                jax.tree.unflatten(treedef, [*leaves[:n], leaves[n] + size * step, *leaves[n + 1 :]]), recipe, batch()
            )
            for size in (1e-6, -1e-6)
        ]
        found.append((near[0] - near[1]) / 2e-6)
    return jax.tree.unflatten(treedef, found)


@pytest.mark.parametrize(
    ("family", "sizes", "gradients"),
    [
        ("llama", {"context": 8}, False),
        ("mistral", {"context": 4, "data": 2}, False),
        ("qwen2", {"context": 4, "tensor": 2}, False),
        ("qwen3", {"context": 4, "tensor": 2}, False),
        ("gemma2", {"context": 4, "tensor": 2}, False),
        pytest.param("qwen2", {"context": 4, "tensor": 2}, True, marks=pytest.mark.slow),
        pytest.param("gemma2", {"context": 4, "tensor": 2}, True, marks=pytest.mark.slow),
        ("gemma3", {"context": 2, "data": 2, "tensor": 2}, True),
    ],
    ids=str,
)
def test_logits_loss_and_gradients_agree_with_the_reference(make_mesh, parameters, family, sizes, gradients):
    (c, recipe), params = CASES[family], parameters(family)
    loss, logits, gradient = ours(c, make_mesh(**sizes), params, batch(), gradients)
    assert loss == pytest.approx(reference_loss(plain(params), recipe, batch()), rel=TOLERANCE)
    assert relative_error(logits, reference_logits(plain(params), recipe, batch())) < TOLERANCE
    if not gradients:
        return
    random = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape), gradient)
    expected = slopes(plain(params), recipe, direction)
    chex.assert_trees_all_equal_structs(gradient, expected)

    def error(gradient, direction, slope) -> float:
        # A sum of many terms of both signs: relative to the norm of the gradient, not to the sum.
        return float(abs(np.sum(gradient * direction) - slope) / np.linalg.norm(gradient))

    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(error, gradient, direction, expected))
    assert not [(jax.tree_util.keystr(path), error) for path, error in errors if error > 5 * TOLERANCE]


BROKEN: dict[str, Any] = {
    "bias": False,
    "qk_norm": False,
    "scale_offset": 0,
    "post_norms": False,
    "embedding_scale": 1.0,
    "activation": silu,
    "query_scale": 8**-0.5,
    "soft_cap": None,
    "final_soft_cap": None,
    "epsilon": 1e-6,
}
"""Values with which a field of a recipe is wrong."""


@pytest.mark.parametrize("family", CASES)
def test_every_speciality_shows_in_the_logits(parameters, family):
    """Otherwise the comparison with the reference would prove nothing."""
    params, recipe = plain(parameters(family)), CASES[family][1]
    right = reference_logits(params, recipe, batch())
    used = [
        field.name for field in fields(Recipe) if field.name in BROKEN and vars(recipe)[field.name] != field.default
    ]
    broken = {name: BROKEN[name] for name in used}
    first = recipe.windows[0]
    if first is not None:
        broken |= {"windows": (first + 1, *recipe.windows[1:])}
    if len(set(recipe.thetas)) > 1:
        broken |= {"thetas": (max(recipe.thetas),) * len(recipe.thetas)}
    for name, value in broken.items():
        wrong = reference_logits(params, replace(recipe, **{name: value}), batch())
        assert relative_error(wrong, right) > 50 * TOLERANCE, name
    assert (
        broken.keys()
        >= {
            "llama": {"epsilon"},
            "mistral": {"windows"},
            "qwen2": {"bias"},
            "qwen3": {"qk_norm"},
            "gemma2": {"windows", "soft_cap", "final_soft_cap", "query_scale", *GEMMA},
            "gemma3": {"windows", "thetas", "qk_norm", *GEMMA},
        }[family]
    )


def test_patterns_and_their_defaults():
    window = {"window": 9}
    for family in FAMILIES:
        assert layer_pattern(replace(SMALL, family=family)) == ("full",)
    assert layer_pattern(replace(SMALL, family="qwen3", **window)) == ("window",)
    assert layer_pattern(replace(SMALL, family="gemma2", **window)) == ("window", "full")
    gemma3 = replace(SMALL, family="gemma3", layers=50, **window)
    assert layer_pattern(gemma3) == ("window",) * 5 + ("full",)
    assert layer_kinds(gemma3) == {"window": 42, "full": 8}
    assert layer_kinds(replace(gemma3, layers=4)) == {"window": 4}
    assert layer_kinds(replace(SMALL, layers=5, pattern=("full", "window"), **window)) == {"full": 3, "window": 2}
    assert layer_mask(gemma3, "window") == Mask(window=(9, 0))
    assert layer_mask(gemma3, "full") == Mask()


def test_caps_and_their_defaults():
    gemma2 = replace(SMALL, family="gemma2")
    assert (attention_soft_cap(gemma2), output_soft_cap(gemma2)) == (50, 30)
    assert (attention_soft_cap(SMALL), output_soft_cap(SMALL)) == (None, None)
    for family in ("llama", "gemma2"):
        for cap, expected in ((0.0, None), (7.5, 7.5)):
            c = replace(SMALL, family=family, soft_cap=cap, final_soft_cap=cap)
            assert (attention_soft_cap(c), output_soft_cap(c)) == (expected, expected)


def abstract_params(c: config.Model) -> Any:
    """The shapes of the parameters, as nested dicts. Call it under a mesh."""
    return nnx.to_pure_dict(jax.eval_shape(lambda: nnx.split(factory(c)())[1]))


def test_parameters_of_a_family(make_mesh):
    """Names and shapes of those that Llama does not have; others are the same."""
    with jax.set_mesh(make_mesh()):
        llama, qwen2, qwen3, gemma3 = (
            {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
            for family in ("llama", "qwen2", "qwen3", "gemma3")
            for leaves in [jax.tree_util.tree_leaves_with_path(abstract_params(replace(SMALL, family=family)))]
        )
    biases = {"query_bias": (2, 4, 8), "key_bias": (2, 2, 8), "value_bias": (2, 2, 8)}
    norms = {"layers.attention.query_norm.scale": (2, 8), "layers.attention.key_norm.scale": (2, 8)}
    post_norms = {f"layers.{name}.post_norm.scale": (2, 32) for name in ("attention", "feed_forward")}
    assert qwen2 == llama | {f"layers.attention.{name}": shape for name, shape in biases.items()}
    assert qwen3 == llama | norms
    assert gemma3 == llama | norms | post_norms


@pytest.mark.parametrize(("family", "scale"), [("llama", 1), ("gemma2", 0)])
def test_a_new_norm_multiplies_by_one(make_mesh, family, scale):
    x = jnp.array([[3.0, -4.0]])
    with jax.set_mesh(make_mesh()):
        norm = RMSNorm(replace(SMALL, family=family), 2)
        assert (norm.scale[...] == scale).all()
        np.testing.assert_allclose(norm(x), x / 12.5**0.5, rtol=1e-6)


def test_only_matrices_are_decayed(make_mesh):
    with jax.set_mesh(make_mesh()):
        params = [abstract_params(replace(SMALL, family=family)) for family in ("qwen2", "gemma3")]
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    decay = optimizer(config.Optimizer(weight_decay=1.0))
    zeros = jax.tree.map(np.zeros_like, ones)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(lambda params: decay.update(zeros, decay.init(params), params))(ones)
    decayed = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if leaf.any()}
    assert decayed == {"embedding", "query", "key", "value", "output", "gate", "up", "down"}
