"""Checkpoints are kept, verified and restored on any mesh; damaged ones are skipped."""

import errno
import gc
import json
import os
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax import P
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from ringattn.mesh.axes import FSDP, TENSOR
from ringattn.runs import checkpoint, reading
from ringattn.runs.checkpoint import Checkpoints, saved_steps
from ringattn.runs.reading import params_digest, read_params
from ringattn.training.step import TrainState


def state(mesh, step, width=8):
    """A small state that differs from step to step, with a sharded matrix."""
    matrix = jax.random.normal(jax.random.key(step), (16, width))
    sharded = jax.device_put(matrix, jax.NamedSharding(mesh, P(FSDP, TENSOR)))
    count, number = (jax.device_put(jnp.int32(step), jax.NamedSharding(mesh, P())) for _ in range(2))
    return TrainState({"matrix": sharded}, {"mean": 2 * sharded, "count": count}, number)


def abstract(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


@pytest.fixture
def mesh(make_mesh):
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def directory(tmp_path, mesh):
    """Checkpoints of steps 2, 4 and 6, with 4 and 6 kept."""
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (2, 4, 6):
            save(checkpoints, step, state(mesh, step))
    return tmp_path / "checkpoints"


def save(checkpoints, step, tree):
    checkpoints.save(step, tree)
    checkpoints.confirm(step)


def restore(directory, mesh, width=8):
    with Checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.restore(abstract(state(mesh, 0, width)))


def listing(directory):
    """Modification times of all files and directories."""
    return {path: path.stat().st_mtime_ns for path in (directory, *directory.rglob("*"))}


def array_file(directory: Path) -> Path:
    """The file that holds the bytes of the matrix."""
    return max((path for path in directory.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_newest_are_kept_and_the_last_is_restored(directory, mesh):
    assert saved_steps(directory) == [6, 4]
    restored, messages = restore(directory, mesh)
    assert messages == []
    assert int(restored.step) == 6
    chex.assert_trees_all_equal(restored, state(mesh, 6))


def test_any_tree_is_restored(tmp_path, mesh):
    tree = [{"b": jnp.arange(3)}, (jnp.float32(2.5),)]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 3, tree)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, messages = checkpoints.restore(abstract(tree))
    assert messages == []
    chex.assert_trees_all_equal(restored, tree)
    chex.assert_trees_all_equal_structs(restored, tree)


def test_restored_on_another_mesh(directory, make_mesh):
    other = make_mesh(1, 4, 1)
    with jax.set_mesh(other):
        restored, _ = restore(directory, other)
        assert restored.params["matrix"].sharding == jax.NamedSharding(other, P(FSDP, TENSOR))
        chex.assert_trees_all_equal(restored, state(other, 6))


def truncate(directory):
    path = array_file(directory)
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(directory):
    content = bytearray(array_file(directory).read_bytes())
    content[len(content) // 2] ^= 1
    array_file(directory).write_bytes(content)


def empty(directory):
    array_file(directory).write_bytes(b"")


def remove_metadata(directory):
    (directory / "facts" / "metadata").unlink()


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, remove_metadata])
def test_the_checkpoint_before_a_damaged_one_is_restored(directory, mesh, damage):
    damage(directory / "6")
    restored, messages = restore(directory, mesh)
    assert int(restored.step) == 4
    chex.assert_trees_all_equal(restored, state(mesh, 4))
    assert len(messages) == 1
    assert messages[0].startswith("checkpoint 6 is damaged (")
    assert messages[0].endswith("); using an earlier checkpoint")
    assert saved_steps(directory) == [4]
    assert (directory / "damaged-6").is_dir()
    with Checkpoints(directory, keep=2) as checkpoints:  # the resumed run writes that step again
        save(checkpoints, 6, state(mesh, 6))
    assert int(restore(directory, mesh)[0].step) == 6


def test_reads_that_a_failed_restore_abandons_print_nothing(tmp_path, mesh, capfd):
    """Orbax closes its event loop when the first of many reads fails."""
    tree = {str(number): jnp.full(1000, number) for number in range(60)}
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        with Checkpoints(directory, keep=2) as checkpoints:
            for step in (1, 2):
                save(checkpoints, step, tree)
        for path in directory.glob("2/state/d/*"):
            path.write_bytes(b"")
        with Checkpoints(directory, keep=2) as checkpoints:
            _, messages = checkpoints.restore(abstract(tree))
        assert len(messages) == 1
    gc.collect()
    assert capfd.readouterr().err == ""


def test_checksums_detect_changed_arrays(directory, mesh, monkeypatch):
    """An array that can be read but is not the one that was written, as after a changed byte on disk."""
    read = reading._read_arrays

    def changed(checkpoint, target):
        arrays = read(checkpoint, target)
        if checkpoint.name == "6":  # two columns exchanged: the sum of all bits is the same
            matrix = arrays["params.matrix"]
            order = jnp.arange(matrix.shape[1]).at[:2].set(jnp.array([1, 0]))
            exchanged = jax.device_get(matrix)[:, order]
            arrays["params.matrix"] = jax.device_put(exchanged, matrix.sharding)
        return arrays

    monkeypatch.setattr(reading, "_read_arrays", changed)
    restored, messages = restore(directory, mesh)
    assert int(restored.step) == 4
    expected = "checkpoint 6 is damaged (the checksum of params.matrix differs); using an earlier checkpoint"
    assert messages == [expected]


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flipped(content):
    return bytes(byte ^ (4 * (at == len(content) // 2)) for at, byte in enumerate(content))


def truncated(content):
    return content[: len(content) // 2]


def zeroed(content):
    return bytes(len(content))


@pytest.mark.parametrize(
    "change", [flipped, *(pytest.param(change, marks=pytest.mark.slow) for change in (truncated, zeroed, None))]
)
def test_damage_of_any_file_is_detected_or_has_no_effect(directory, mesh, change):
    """Each file of the checkpoint, metadata of Orbax and TensorStore included. Without `change`, it is deleted."""
    names, effects = [path.relative_to(directory / "6") for path in files_of(directory / "6")], []
    assert len(names) > 8
    for name in names:
        path = directory / "6" / name
        content = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(content))
        restored, messages = restore(directory, mesh)
        chex.assert_trees_all_equal(restored, state(mesh, int(restored.step)))
        assert saved_steps(directory) == ([4] if messages else [6, 4]), name
        effects.append((str(name), [message.startswith("checkpoint 6 is damaged (") for message in messages]))
        if messages:
            (directory / "damaged-6").rename(directory / "6")
        path.write_bytes(content)
    assert ("facts/metadata", [True]) in effects
    assert ("state/_METADATA", [True]) in effects or ("state/manifest.ocdbt", [True]) in effects
    assert int(restore(directory, mesh)[0].step) == 6


TENSORSTORE = "UNKNOWN: Error reading: Input/output error [tensorstore_spec='{}'] [os_error_code='5'] [source='']"
"""As TensorStore 0.1.86 reports a failed read."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (MemoryError(), "out of memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), "RESOURCE_EXHAUSTED"),
        (ValueError(TENSORSTORE), "Input/output error"),
    ],
)
def test_an_error_that_is_no_evidence_of_damage_leaves_the_checkpoint_alone(
    directory, mesh, monkeypatch, error, reason
):
    def failing(*args):
        raise ValueError("cannot restore") from error

    before = listing(directory)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_read_arrays", failing)
        message = rf"6 cannot be read \({reason}.*\), but may be intact; nothing was changed; fix the cause"
        with pytest.raises(ValueError, match=message):
            restore(directory, mesh)
        with pytest.raises(ValueError, match=message):
            read_params(directory, 6, abstract(state(mesh, 6)).params)
    assert listing(directory) == before
    assert int(restore(directory, mesh)[0].step) == 6


def test_a_disk_that_returns_errors_leaves_the_checkpoint_alone(directory, mesh):
    """Reads of /proc/self/mem at 0 give an input/output error, like a broken disk."""
    path = directory / "6" / "state" / "_METADATA"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"6 cannot be read \(Input/output error\), but may be intact"):
        restore(directory, mesh)
    assert saved_steps(directory) == [6, 4]


def test_a_description_that_is_nested_too_deeply_has_no_effect(directory, mesh):
    for step in (4, 6):
        (directory / str(step) / "_CHECKPOINT_METADATA").write_bytes(b"[" * 5000 + b"]" * 5000)
    assert int(restore(directory, mesh)[0].step) == 6
    with Checkpoints(directory, keep=2) as checkpoints:
        save(checkpoints, 8, state(mesh, 8))
    assert saved_steps(directory) == [8, 6]


def test_other_entries_are_no_checkpoints(directory, mesh):
    for name in ("8.orbax-checkpoint-tmp", "abc", "007", "0", "٩", "damaged-9", "10.5", "-3"):
        (directory / name).mkdir()
    (directory / "5").write_text("")
    assert saved_steps(directory) == [6, 4]
    restored, messages = restore(directory, mesh)
    assert (int(restored.step), messages) == (6, [])
    with Checkpoints(directory, keep=2) as checkpoints:
        save(checkpoints, 7, state(mesh, 7))
    assert saved_steps(directory) == [7, 6]
    assert {"abc", "007", "5", "damaged-9"} < {path.name for path in directory.iterdir()}


@contextmanager
def files_up_to(size):
    """Limits the size of files, which fails writes as a full disk does."""
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_an_error_and_loses_no_checkpoint(directory, mesh, capfd):
    before = files_of(directory)
    message = r"cannot write to \S*checkpoints \(File too large\); free disk space or make it writable"
    with files_up_to(64), pytest.raises(ValueError, match=message), Checkpoints(directory, keep=1) as checkpoints:
        save(checkpoints, 8, state(mesh, 8))
    assert files_of(directory) == before
    assert capfd.readouterr().err == ""


def test_after_a_failed_write_the_next_is_tried_and_old_checkpoints_stay(directory, mesh, capfd):
    lines = []
    with Checkpoints(directory, keep=2, report=lines.append) as checkpoints:
        for step, size in ((8, 64), (12, resource.RLIM_INFINITY), (14, 64)):
            with files_up_to(size):
                save(checkpoints, step, state(mesh, step))
                checkpoints._settle()
            assert saved_steps(directory) == ([6, 4] if step < 12 else [12, 6])
    assert saved_steps(directory) == [12, 6]
    assert [line.split(" to /")[0] for line in lines] == [f"checkpoint {step} was not saved" for step in (8, 14)]
    assert all("(File too large); later ones will be tried" in line for line in lines)
    assert checkpoints.failures == 2
    assert (int(restore(directory, mesh)[0].step), capfd.readouterr().err) == (12, "")


def test_a_write_whose_description_fails_fails_while_other_threads_continue(directory, mesh, monkeypatch):
    """Orbax raises the error of its description of a step while the threads that write the arrays continue."""
    lines, finalize = [], checkpoint._StateHandler.finalize

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finalize_late(*args):
        time.sleep(0.5)
        finalize(*args)

    with Checkpoints(directory, keep=2, report=lines.append) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint._StateHandler, "finalize", finalize_late)
            patch.setattr(orbax_metadata._NonBlockingMetadataStore, "_write_and_log", fail)
            checkpoints.save(8, state(mesh, 8))
            while not lines:
                checkpoints.confirm(7)  # must not wait for a confirmation of 8
            checkpoints.confirm(8)
        save(checkpoints, 12, state(mesh, 12))
    assert [line.split(" to /")[0] for line in lines] == ["checkpoint 8 was not saved"]
    assert checkpoints.failures == 1
    assert int(restore(directory, mesh)[0].step) == 12
    assert saved_steps(directory) == [12, 6]


def test_a_checkpoint_that_cannot_be_removed_is_reported(directory, mesh, monkeypatch):
    lines = []

    def busy(*args):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with Checkpoints(directory, keep=2, report=lines.append) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", busy)
            save(checkpoints, 8, state(mesh, 8))
            checkpoints._settle()
        save(checkpoints, 10, state(mesh, 10))
    assert lines == ["checkpoint 8 was saved, but an earlier one was not removed (Device or resource busy)"]
    assert checkpoints.failures == 0
    assert saved_steps(directory) == [10, 8]


def no_space(monkeypatch, directory):
    usage = shutil.disk_usage(directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


def read_only(monkeypatch, directory):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint, "TemporaryFile", refuse)


@pytest.mark.parametrize(
    ("limit", "problem"),
    [(no_space, "it needs .* KiB, and 1,000 bytes are free"), (read_only, "Read-only file system")],
)
def test_a_checkpoint_that_cannot_be_written_is_not_started(directory, mesh, monkeypatch, limit, problem):
    before, lines = files_of(directory), []
    limit(monkeypatch, directory)
    with Checkpoints(directory, keep=2, report=lines.append) as checkpoints:
        save(checkpoints, 8, state(mesh, 8))
    assert files_of(directory) == before
    assert re.match(f"checkpoint 8 was not saved to .* \\({problem}\\); later", lines[0]), lines


def test_the_verified_checkpoint_is_kept(directory, mesh):
    """It may be the only one without damage: the later ones have not been read."""
    with Checkpoints(directory, keep=1) as checkpoints:
        assert int(checkpoints.restore(abstract(state(mesh, 0)))[0].step) == 6
        for step in (8, 10):
            save(checkpoints, step, state(mesh, step))
    assert saved_steps(directory) == [10, 6]
    with Checkpoints(directory, keep=1) as checkpoints:
        assert int(checkpoints.restore(abstract(state(mesh, 0)))[0].step) == 10
        save(checkpoints, 12, state(mesh, 12))
    assert saved_steps(directory) == [12, 10]


def test_no_readable_checkpoint_is_an_error(directory, mesh):
    for step in (4, 6):
        remove_metadata(directory / str(step))
    with pytest.raises(ValueError, match=r"no readable checkpoint .* another --name"):
        restore(directory, mesh)
    assert saved_steps(directory) == [6, 4]


def test_a_checkpoint_of_another_model_is_an_error(directory, mesh):
    with pytest.raises(ValueError, match=r"params.matrix is \[16, 8\] in the checkpoint but \[16, 4\] in the config"):
        restore(directory, mesh, width=4)


def test_the_state_may_be_donated_while_it_is_written(tmp_path, mesh):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    current = state(mesh, 1)
    expected = jax.device_get(current)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, current)
        for _ in range(5):
            current = advance(current)
        checkpoints.confirm(1)
    restored, messages = restore(tmp_path, mesh)
    assert messages == []
    chex.assert_trees_all_equal(jax.device_get(restored), expected)


def test_a_state_that_is_not_finite_is_not_saved(directory, mesh):
    broken = jax.tree.map(lambda x: x / 0 if x.dtype == jnp.float32 else x, state(mesh, 8))
    message = r"contains NaN or infinity after step 8; no checkpoint saved; lower --optimizer"
    with Checkpoints(directory, 2) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.save(8, broken)
    assert saved_steps(directory) == [6, 4]


def test_an_unconfirmed_checkpoint_is_not_written_and_those_before_it_stay(directory, mesh, capfd):
    before = listing(directory)
    with Checkpoints(directory, keep=1) as checkpoints:  # keeps 8, and removes 4 and 6, if 8 is confirmed
        checkpoints.save(8, state(mesh, 8))
        checkpoints.confirm(7)  # step 8 was computed, but no step from its state
    assert saved_steps(directory) == [6, 4]
    assert {path: time for path, time in listing(directory).items() if path != directory} == {
        path: time for path, time in before.items() if path != directory
    }
    assert capfd.readouterr().err == ""


def test_a_later_checkpoint_replaces_an_unconfirmed_one(directory, mesh):
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(8, state(mesh, 8))
        checkpoints.save(10, state(mesh, 10))
        checkpoints.confirm(10)
    assert saved_steps(directory) == [10, 6]
    restored, _ = restore(directory, mesh)
    chex.assert_trees_all_equal(restored, state(mesh, 10))


def test_only_parameters_are_read_and_nothing_is_written(directory, mesh, make_mesh, monkeypatch):
    before = listing(directory)
    other, requested = make_mesh(context=8), []
    like = {"matrix": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=jax.NamedSharding(other, P(FSDP)))}
    restore_args = ocp.checkpoint_utils.construct_restore_args
    monkeypatch.setattr(
        ocp.checkpoint_utils, "construct_restore_args", lambda target: requested.extend(target) or restore_args(target)
    )
    with jax.set_mesh(other):
        params = read_params(directory, 4, like)
    chex.assert_trees_all_equal(params, state(mesh, 4).params)
    assert params["matrix"].sharding == like["matrix"].sharding
    assert requested == ["params.matrix"]  # not the optimizer state
    assert params_digest(directory, 4) == params_digest(directory, 4) != params_digest(directory, 6)
    assert listing(directory) == before


def test_damaged_parameters_are_refused(directory, mesh):
    like = {"matrix": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P()))}
    narrow = {"matrix": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=like["matrix"].sharding)}
    with pytest.raises(ValueError, match=r"4 does not match: .* params.matrix is \[16, 8\] .* but \[16, 4\] in"):
        read_params(directory, 4, narrow)
    metadata = directory / "4" / "facts" / "metadata"
    content = json.loads(metadata.read_text())
    content["sums"]["params.matrix"] ^= 1
    metadata.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"4 is damaged \(the checksum of its metadata differs\); use another"):
        read_params(directory, 4, like)
    metadata.unlink()
    before = listing(directory)
    for read in (lambda: read_params(directory, 4, like), lambda: params_digest(directory, 4)):
        with pytest.raises(ValueError, match=r"4 is damaged .*; use another checkpoint"):
            read()
    assert listing(directory) == before


def test_a_missing_checkpoint_is_refused_and_no_directory_appears(tmp_path):
    with pytest.raises(ValueError, match=r"4 is damaged .*; use another checkpoint"):
        params_digest(tmp_path / "checkpoints", 4)
    assert list(tmp_path.iterdir()) == []
