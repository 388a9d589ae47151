"""Training with `data.separate_documents=False`: a row is one sequence, on any mesh and with the kernel for GPUs."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from test_cudnn import Dense

from ringattn import config
from ringattn.attn import strategies
from ringattn.attn.kernels import cudnn
from ringattn.config.stages import with_values
from ringattn.data import Batch, dataset
from ringattn.training.diagnosis import diagnose
from ringattn.training.stage import Run, kernel_notes, prepare_stage

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Config of rows of several documents, in two microbatches."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(40):
        text = np.random.default_rng(number).integers(97, 107, 30, dtype=np.uint8)
        (directory / f"{number}.txt").write_bytes(text.tobytes())
    return config.Config(
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(directory), seq_len=64, validation=0.3, separate_documents=False),
        train=config.Train(batch_size=4, accumulate=2),
        validation=config.Validation(batches=1),
    )


def separate(c: config.Config) -> config.Config:
    return with_values(c, {"data.separate_documents": True})


def measured(c: config.Config, mesh: jax.sharding.Mesh, change: Any = lambda batch: batch) -> dict[str, float]:
    """Returns loss and norm of the gradient of the first step, and the losses of a validation before it."""
    with jax.set_mesh(mesh):
        run = prepare_stage(c, mesh)
        state = run.initial_state()
        validation = run.validate(state.params)
        _, metrics = run.train_step(state, run.place(change(run.training.batch(0))))
    return validation | {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm)}


def as_one_segment(batch: Batch) -> Batch:
    return batch._replace(
        positions=np.tile(np.arange(batch.tokens.shape[1], dtype=np.int32), (len(batch.tokens), 1)),
        segment_ids=np.zeros_like(batch.tokens),
    )


def test_a_ring_gives_the_loss_of_one_device_and_tokens_see_the_documents_before(base, make_mesh):
    """The loss is that of one segment per row, and not that of separate documents."""
    one, mesh = measured(base, make_mesh()), make_mesh(context=4)
    joined, documents = measured(base, mesh), measured(separate(base), mesh)
    assert joined == pytest.approx(one, rel=1e-5)
    forced = measured(separate(base), mesh, as_one_segment)
    for name in ("loss", "grad_norm"):
        assert joined[name] == pytest.approx(forced[name], rel=1e-6)
        assert abs(joined[name] - documents[name]) > 1e-5 * joined[name]
    assert joined["eval/loss"] != documents["eval/loss"]


def test_rows_of_one_document_do_not_differ(base, make_mesh, monkeypatch, tmp_path):
    """Needles of one document per row, and a text that is longer than many rows."""
    monkeypatch.setattr(dataset, "TASK_TOKENS", 2**14)
    text = tmp_path / "long.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 107, 4000, dtype=np.uint8).tobytes())
    for path, length in (("task:needle", 256), (str(text), 64)):
        c = with_values(base, {"data.path": path, "data.seq_len": length})
        joined, documents = (measured(each, make_mesh(context=4)) for each in (c, separate(c)))
        assert joined == documents


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """Traces attention for the test alone: JAX would reuse the kernels of earlier traces."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_the_kernel_for_gpus_serves_rows_that_are_one_sequence(base, make_mesh, monkeypatch, traced_anew):
    """With kernel="auto" on an H100, of which only the kind is simulated."""
    calls = []

    class Counted(Dense):
        compute = np.float32

        def forward(self, *arrays):
            calls.append("forward")
            return super().forward(*arrays)

        def backward(self, *arrays):
            calls.append("backward")
            return super().backward(*arrays)

    c, mesh = with_values(base, {"model.dtype": "bfloat16"}), make_mesh(context=4)
    monkeypatch.setattr(strategies, "device_kind", lambda: H100)
    monkeypatch.setattr(cudnn, "Fused", Counted)
    expected = measured(separate(c), mesh, as_one_segment)
    assert calls == []
    found = measured(c, mesh)
    documents = measured(separate(c), mesh)
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
        assert found[name] != pytest.approx(documents[name], rel=5e-4)
    assert set(calls) == {"forward", "backward"}


@pytest.mark.parametrize(
    ("kind", "given", "notes"), [(H100, True, 1), (H100, False, 0), ("TPU v5", True, 0), ("cpu", True, 0)]
)
def test_a_run_on_gpus_says_how_to_use_cudnn(base, kind, given, notes):
    c = with_values(base, {"model.dtype": "bfloat16", "data.separate_documents": given})
    assert sum("--data.separate_documents False" in note for note in kernel_notes(c, kind)) == notes


def test_diagnosis_and_samples_take_rows_without_segment_ids(base, make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=4)):
        run: Run = prepare_stage(base, mesh)
        params = run.initial_state().params
        assert "is finite: suspect faulty hardware" in diagnose(run, params, 1)
        assert run.samples(params, lambda: None).count("--- model continuation") == 3
