import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from ringattn.mesh import FSDP, TENSOR
from ringattn.training.checkpoint import Checkpoints, params_digest, read_params, saved_steps
from ringattn.training.step import TrainState

# A reader that fails leaves reads behind that it never awaits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def state(mesh, step, width=8):
    """A small state that differs from step to step, its matrix in pieces."""
    matrix = jax.random.normal(jax.random.key(step), (16, width))
    sharded = jax.device_put(matrix, jax.NamedSharding(mesh, P(FSDP, TENSOR)))
    whole = jax.NamedSharding(mesh, P())
    count, number = (jax.device_put(jnp.int32(value), whole) for value in (step, step))
    return TrainState({"matrix": sharded}, {"mean": 2 * sharded, "count": count}, number)


def abstract(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


@pytest.fixture
def mesh(make_mesh):
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def folder(tmp_path, mesh):
    """Checkpoints of steps 2, 4 and 6, of which 4 and 6 are kept."""
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(state(mesh, step))
    return tmp_path / "checkpoints"


def restored(folder, mesh, width=8):
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(abstract(state(mesh, 0, width)))


def array_file(folder: Path) -> Path:
    """The file that holds the matrix's bytes."""
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_keeps_the_newest_and_restores_it(folder, mesh):
    assert saved_steps(folder) == [6, 4]
    found, notes = restored(folder, mesh)
    assert notes == []
    assert int(found.step) == 6
    jax.tree.map(np.testing.assert_array_equal, found, state(mesh, 6))


def test_restores_on_another_mesh(folder, make_mesh):
    other = make_mesh(1, 4, 1)
    with jax.set_mesh(other):
        found, _ = restored(folder, other)
        assert found.params["matrix"].sharding == jax.NamedSharding(other, P(FSDP, TENSOR))
        np.testing.assert_array_equal(found.params["matrix"], state(other, 6).params["matrix"])


def truncate(folder):
    path = array_file(folder)
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(folder):
    content = bytearray(array_file(folder).read_bytes())
    content[len(content) // 2] ^= 1
    array_file(folder).write_bytes(content)


def empty_out(folder):
    array_file(folder).write_bytes(b"")


def lose_the_facts(folder):
    (folder / "facts" / "metadata").unlink()


@pytest.mark.parametrize("damage", [truncate, empty_out, flip_a_bit, lose_the_facts])
def test_goes_back_to_the_one_before_a_damaged_one(folder, mesh, damage):
    damage(folder / "6")
    found, notes = restored(folder, mesh)
    assert int(found.step) == 4
    jax.tree.map(np.testing.assert_array_equal, found, state(mesh, 4))
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint 6 is damaged")
    assert saved_steps(folder) == [4]
    assert (folder / "damaged-6").is_dir()
    with Checkpoints(folder, keep=2) as checkpoints:  # the run may come by that step again
        checkpoints.save(state(mesh, 6))
    assert int(restored(folder, mesh)[0].step) == 6


def test_notices_what_the_reader_does_not(folder, mesh, monkeypatch):
    """An array that reads well but is not what was written, as after one changed byte on the disk."""
    read = Checkpoints._read

    def changed(self, step, target, sums):
        if step == 6:
            sums = sums | {"params.matrix": sums["params.matrix"] ^ 1}
        return read(self, step, target, sums)

    monkeypatch.setattr(Checkpoints, "_read", changed)
    found, notes = restored(folder, mesh)
    assert int(found.step) == 4
    assert notes == ["checkpoint 6 is damaged, going back: params.matrix is not what was written"]


def test_an_unfinished_write_is_no_checkpoint(folder, mesh):
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    assert int(restored(folder, mesh)[0].step) == 6


def test_says_so_if_none_can_be_read(folder, mesh):
    for step in (4, 6):
        lose_the_facts(folder / str(step))
    with pytest.raises(ValueError, match=r"no readable checkpoint .* another --name"):
        restored(folder, mesh)
    assert saved_steps(folder) == [6, 4]


def test_refuses_another_model(folder, mesh):
    with pytest.raises(ValueError, match=r"params.matrix is \[16, 8\] there and \[16, 4\] here"):
        restored(folder, mesh, width=4)


def test_the_state_may_be_donated_while_it_is_written(tmp_path, mesh):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    current = state(mesh, 1)
    expected = jax.device_get(current)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(current)
        for _ in range(5):
            current = advance(current)
    found, notes = restored(tmp_path, mesh)
    assert notes == []
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def test_what_is_not_finite_is_not_saved(folder, mesh):
    broken = jax.tree.map(lambda x: x / 0 if x.dtype == jnp.float32 else x, state(mesh, 8))
    lower = r"is not finite after step 8, which is not saved: lower --optimizer"
    with Checkpoints(folder, 2) as checkpoints, pytest.raises(ValueError, match=lower):
        checkpoints.save(broken)
    assert saved_steps(folder) == [6, 4]


def test_parameters_are_read_alone_and_the_folder_is_left_as_it_is(folder, mesh, make_mesh):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = make_mesh(context=8)
    like = {"matrix": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=jax.NamedSharding(other, P(FSDP)))}
    with jax.set_mesh(other):
        found = read_params(folder, 4, like)
    np.testing.assert_array_equal(found["matrix"], state(mesh, 4).params["matrix"])
    assert found["matrix"].sharding == like["matrix"].sharding
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert params_digest(folder, 4) == params_digest(folder, 4) != params_digest(folder, 6)


def test_damaged_parameters_are_refused(folder, mesh):
    like = {"matrix": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P()))}
    with pytest.raises(ValueError, match=r"4 is of another model: params.matrix is \[16, 8\] there and \[16, 4\] here"):
        read_params(folder, 4, {"matrix": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=like["matrix"].sharding)})
    facts = folder / "4" / "facts" / "metadata"
    content = json.loads(facts.read_text())
    content["sums"]["params.matrix"] ^= 1
    facts.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"4 is damaged \(params.matrix is not what was written\): name another"):
        read_params(folder, 4, like)
    facts.unlink()
    for read in (lambda: read_params(folder, 4, like), lambda: params_digest(folder, 4)):
        with pytest.raises(ValueError, match=r"4 is damaged .*: name another checkpoint"):
            read()
