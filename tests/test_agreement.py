"""Several processes agree on the step after which they stop, and on failed checkpoints."""

import sys

import pytest
from test_multiprocess import ROOT, command, losses, run_processes

from ringattn.mesh import peers
from ringattn.runs.watchdog import HUNG

AGREE = """
import time
import jax
import numpy as np
from ringattn import config
from ringattn.mesh import board
from ringattn.mesh.agreement import Agreement
from ringattn.mesh.devices import start
mesh, process = start(config.Mesh(simulate=2)), jax.process_index()
with jax.set_mesh(mesh):
    agree, add = Agreement(), jax.jit(lambda x: x.sum())
    total = jax.device_put(np.zeros(4, np.float32), jax.NamedSharding(mesh, jax.P("context")))
    numbers, previous = [], None
    for step in range(60):
        previous, current = add(total), previous
        if current is not None:
            current.block_until_ready()
        time.sleep(0.01 * process * (step % 3 == 0))
        agree(7, computed=False)
        numbers.append(agree(15 if step >= 20 and process == 1 else 0))
    last = agree.now(process)
board.post(f"test/1/{process}", f"text {process}")
agree.now(0)
texts = board.read("test/1/")
agree.now(0)
if process == 0:
    board.remove("test/1/")
agree.now(0)
print(f"result {numbers.index(15)} {set(numbers[22:])} {last} {sorted(texts.items())} {board.read('test/1/')}",
      flush=True)
"""
ONE_FAILS = f"""
import os, resource, runpy, signal, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import startup  # before the package, as in a script
from ringattn.runs.checkpoint import Checkpoints
from ringattn.training.recorder import Recorder
save, fail, record = Checkpoints.save, Checkpoints._fail, Recorder.step
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def limited(self, step, tree):
    if step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    save(self, step, tree)

def restored(self, *args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    fail(self, *args)

def signalled(self, step, *args):
    if step == 9:
        os.kill(os.getpid(), signal.SIGTERM)
    record(self, step, *args)

Checkpoints.save, Checkpoints._fail, Recorder.step = limited, restored, signalled
sys.argv[0] = {str(ROOT / "scripts/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


HANGS = f"""
import runpy, sys, threading
sys.path.insert(0, {str(ROOT / "scripts")!r})
import startup  # before the package, as in a script
from ringattn.runs import watchdog
from ringattn.training.recorder import Recorder
record, hangs, watchdog.SUSPECT_SECONDS = Recorder.step, sys.argv.pop(1), 0.5

def hang():
    watchdog.LEAST_SECONDS = 1.0  # the limit of the other process is 10 minutes
    threading.Event().wait()

def step_or_hang(self, step, *args):
    if step == 4 and hangs:
        hang()
    return record(self, step, *args)

Recorder.step, sys.argv[0] = step_or_hang, {str(ROOT / "scripts/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_number_of_one_process_reaches_all_at_the_same_call():
    done = run_processes(*[[sys.executable, "-c", AGREE]] * 2)
    lines = [[line for line in stdout.splitlines() if line.startswith("result ")] for stdout, *_ in done]
    expected = "result 22 {15} 1 [('0', 'text 0'), ('1', 'text 1')] {}"
    assert lines == [[expected]] * 2, done


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_save_and_a_signal_of_one_process_are_those_of_both(text, failing):
    flags = ["--data.path", str(text / "one"), "--mesh.simulate", "4", "--train.steps", "1000"]
    each = command(text, *flags, "--checkpoint.every", "2", "--validation.every", "1000")
    both = [each, each]
    both[failing] = [sys.executable, "-c", ONE_FAILS, *each[2:]]
    done = run_processes(*both)
    assert [status for *_, status in done] == [143, 143], done
    out = done[0][0]
    place = "" if failing == 0 else "in process 1: "
    assert f"({place}File too large); later ones will be tried" in out
    assert out.count("was not saved to") == 1
    assert "stopped by SIGTERM after step 1" in out  # a few steps after step 9
    last = int(out.split("stopped by SIGTERM after step ")[1].split(";")[0])
    assert 9 < last < 18
    assert f"after step {last}; checkpoint saved" in out
    assert len(losses(text, "quickstart")) == last


@pytest.fixture
def text(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.txt").write_text("some words of text " * 300)
    return tmp_path


@pytest.mark.slow
def test_all_processes_write_their_stacks_if_one_hangs(text):
    each = command(text, "--data.path", str(text / "one"), "--mesh.simulate", "4", "--train.steps", "1000")
    done = run_processes(*[[sys.executable, "-c", HANGS, hang, *each[2:]] for hang in ("", "hang")])
    assert HUNG in [status for *_, status in done], done
    assert {status for *_, status in done} <= {HUNG, peers.STATUS}, done
    stacks = [(text / "runs" / "quickstart" / f"hang-{index}.txt").read_text() for index in range(2)]
    assert ["in hang\n" in stack for stack in stacks] == [False, True]
