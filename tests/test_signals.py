"""Ctrl-C and SIGTERM: in scripts, in a training loop, and where ringattn is only imported."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import FAST_COMPILATION

from ringattn.runs import signals
from ringattn.runs.signals import before_ending, stopped_by_signal

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENVIRON |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_COMPILATION}
SCRIPT = f"""
import gc, hashlib, os, signal, sys, threading
sys.path.insert(0, {str(SCRIPTS)!r})
from startup import signals
signals.end_on_signals("try again")
assert "jax" not in sys.modules
"""
"""Begins like every script, without JAX, so that it takes 0.1 s."""
WAIT = "print('ready'); threading.Event().wait()\n"
IN_C = "print('ready'); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)  # returns to Python after half an hour\n"
IN_A_GC_CALLBACK = f"""
def callback(phase, info):
    gc.callbacks.clear()
    {WAIT}
gc.callbacks.append(callback)
gc.collect()
"""
CLEANING = f"""
with signals.before_ending(lambda: os.write(1, b"removed\\n")):  # print could be interrupted by itself
    {WAIT}
"""
CLEANING_IN_C = f"""
with signals.before_ending(lambda: os.write(1, b"removed\\n"), immediately=True):
    {IN_C}
"""
LOOP = """
with signals.stopped_by_signal(print) as stop:
    stop.arm()
    print("ready")
    while not stop.number:
        threading.Event().wait(0.01)
print("saved")
sys.exit(128 + stop.number)
"""
LOOP_IN_C = f"""
with signals.stopped_by_signal(print) as stop:
    stop.arm()
    {IN_C}
"""
NOT_ARMED = f"""
with signals.stopped_by_signal(print) as stop:
    {IN_C}
"""
SLOW_REPORT = """
def report(line):
    threading.Event().wait(0.3)
    print(line)
with signals.stopped_by_signal(report) as stop:
    stop.arm()
    print("ready")
    while signals._script.claims:
        threading.Event().wait(0.01)
print("stopped" if stop.number else "no signal")
"""
DISARMED = f"""
with signals.stopped_by_signal(print) as stop:
    stop.arm()
{WAIT}
"""
SAVING = "saving after this step; send it again to stop immediately"


def deliver(words: Sequence[str], *deliveries: tuple[str, Sequence[int]]) -> tuple[int, list[str], list[str]]:
    """Starts Python and, at each line of output that contains a text, sends signals. Returns status, stdout, stderr.

    Python's own reports of imports, on stderr, count as output and are not returned.
    """
    stderr = subprocess.STDOUT if "importtime" in words else subprocess.PIPE
    command = [sys.executable, *words]
    with subprocess.Popen(command, env=ENVIRON, text=True, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        watchdog, out = threading.Timer(300, process.kill), list[str]()  # otherwise a failure would take half an hour
        watchdog.start()
        for text, numbers in deliveries:
            for line in process.stdout:
                out.append(line.rstrip())
                if text in line:
                    break
            for number in numbers:
                process.send_signal(number)
        rest, err = process.communicate()
        watchdog.cancel()
    out += rest.splitlines()
    return process.returncode, [line for line in out if "import time:" not in line], (err or "").splitlines()


@pytest.mark.parametrize(
    "code", [WAIT, IN_C, IN_A_GC_CALLBACK, NOT_ARMED, DISARMED], ids=["python", "c", "gc", "early", "late"]
)
@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGINT] * 20, [signal.SIGTERM]], ids=["SIGINT", "often", "SIGTERM"]
)
def test_a_signal_ends_a_script_with_one_line(code, numbers):
    done = deliver(["-c", SCRIPT + code], ("ready", numbers))
    assert done == (128 + numbers[0], ["ready"], [f"stopped by {numbers[0].name}; try again"])


def test_a_signal_that_ends_a_script_removes_temporary_files():
    for numbers in ([signal.SIGTERM], [signal.SIGINT] * 3):
        status, out, err = deliver(["-c", SCRIPT + CLEANING], ("ready", numbers))
        assert (status, err) == (128 + numbers[0], [f"stopped by {numbers[0].name}; try again"])
        assert len(numbers) > 1 or out == ["ready", "removed"]


def test_a_compiler_that_runs_does_not_delay_what_is_removed_immediately():
    for number in (signal.SIGTERM, signal.SIGINT):
        done = deliver(["-c", SCRIPT + CLEANING_IN_C], ("ready", [number]))
        assert done == (128 + number, ["ready", "removed"], [f"stopped by {number.name}; try again"])


def test_the_first_signal_lets_a_loop_save_and_the_second_ends_the_script():
    done = deliver(["-c", SCRIPT + LOOP], ("ready", [signal.SIGTERM]))
    assert done == (143, ["ready", f"SIGTERM: {SAVING}", "saved"], [])
    done = deliver(["-c", SCRIPT + LOOP_IN_C], ("ready", [signal.SIGINT]), (SAVING, [signal.SIGINT]))
    assert done == (130, ["ready", f"SIGINT: {SAVING}"], ["stopped by SIGINT; try again"])


def test_a_signal_that_is_being_reported_counts_when_the_loop_ends():
    done = deliver(["-c", SCRIPT + SLOW_REPORT], ("ready", [signal.SIGTERM]))
    assert done == (0, ["ready", f"SIGTERM: {SAVING}", "stopped"], [])


def test_a_forked_child_and_an_ignored_signal_do_not_end_a_script():
    forked = """
reader, writer = os.pipe()
child = os.fork()
if not child:
    os.write(writer, b"x")
    threading.Event().wait()
os.read(reader, 1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
"""
    ignored = SCRIPT.replace("from startup", "signal.signal(signal.SIGINT, signal.SIG_IGN); from startup")
    ignored += "os.kill(os.getpid(), signal.SIGINT); print('alive')"
    assert deliver(["-c", SCRIPT + forked + "print('alive')"]) == (0, ["alive"], [])
    assert deliver(["-c", ignored]) == (0, ["alive"], [])


def test_the_cursor_of_a_terminal_is_shown_again():
    reader, terminal = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT + WAIT], env=ENVIRON, stdout=terminal, stderr=terminal
    ) as process:
        out = b""
        while b"ready" not in out:
            out += os.read(reader, 1000)
        process.send_signal(signal.SIGINT)
    out = os.read(reader, 1000)
    assert b"\x1b[?25h\r\nstopped by SIGINT; try again\r\n" in out


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "startup.py"))
def test_a_signal_ends_each_script_while_it_imports_jax(script):
    words = ["-X", "importtime", str(SCRIPTS / script), "--config", str(ROOT / "configs" / "quickstart.py")]
    status, out, _ = deliver(words, ("jax._src", [signal.SIGINT] * 3))
    assert status == 130
    assert len(out) == 1
    assert out[0].startswith("stopped by SIGINT")


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_while_its_step_compiles(tmp_path, number, processes):
    """Alone, and with `jax.distributed`, which has its own handler of SIGTERM."""
    (tmp_path / "text.txt").write_text("some words " * 2000)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    endless = f"""
import hashlib, os, runpy, sys
import jax
if {processes}:
    os.environ |= {{"JAX_COORDINATOR_ADDRESS": "localhost:{port}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}}
def compile(self):
    from ringattn.training import loop
    assert loop.stopped_by_signal.__globals__["_script"], "scripts/startup.py and the package use the same module"
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
jax.stages.Lowered.compile = compile
sys.path.insert(0, {str(SCRIPTS)!r})
sys.argv[0] = {str(SCRIPTS / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    words = ["--config", str(ROOT / "configs" / "quickstart.py"), "--data.path", str(tmp_path / "text.txt")]
    words += ["--data.seq_len", "64", "--model.layers", "1", "--log.directory", str(tmp_path)]
    status, out, err = deliver(["-c", endless, *words], ("compiling the train step", [number]))
    assert (status, err[-1]) == (128 + number, f"stopped by {number.name}; run the same command again to resume")
    assert processes or len(err) == 1  # otherwise preceded by the log of JAX's coordinator
    assert out[-1] == "compiling the train step"


def test_where_ringattn_is_imported_the_second_signal_raises_keyboard_interrupt():
    """As in a notebook."""
    assert signals._script is None
    before, lines = signal.getsignal(signal.SIGINT), []
    with stopped_by_signal(lines.append) as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.arm()
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.number, lines) == (signal.SIGINT, [f"SIGINT: {SAVING}"])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), before_ending(lambda: lines.append("removed")):
        os.kill(os.getpid(), signal.SIGINT)
    assert "removed" not in lines  # the exception unwinds the stack


def test_a_loop_in_another_thread_leaves_the_handlers_alone():
    before, stops = signal.getsignal(signal.SIGINT), []

    def loop():
        with stopped_by_signal(print) as stop:
            stop.arm()
            stops.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert stops == [before]
