"""The display: a progress bar on a terminal, plain lines otherwise."""

import re

import pytest

from ringattn.runs import progress
from ringattn.runs.progress import Display


@pytest.fixture
def terminal(monkeypatch):
    """Makes displays believe that the output is a terminal. Returns the clock of their bars, set by hand."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    monkeypatch.setattr("rich.console.monotonic", clock)
    return clock


def test_plain_lines_off_a_terminal(capsys):
    with Display(10, label="hashing") as display:
        display.update(5, "halfway")
        with display.subtask("samples", 3) as advance:
            advance(2)
        display.print("[bold] x = [1, 2]: " + "long " * 50)
    assert not display.is_terminal
    assert capsys.readouterr().out == "[bold] x = [1, 2]: " + "long " * 50 + "\n"  # no bar, no markup, no wrapping


def test_a_bar_on_a_terminal(terminal, capsys):
    with Display(10, label="hashing") as display:
        display.update(5, "halfway")
        display.print("a line above it")
    assert display.is_terminal
    out = capsys.readouterr().out
    assert "a line above it" in out
    assert "5/10" in out
    assert "halfway" in out


@pytest.mark.parametrize("every_process", [False, True])
def test_only_the_first_process_prints(capsys, monkeypatch, every_process):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    with Display(10, every_process=every_process) as display:
        display.print("a line")
    assert capsys.readouterr().out == "a line\n" * every_process


def test_a_display_of_every_process_does_not_start_jax(monkeypatch):
    def refuse():
        raise AssertionError("starts JAX")

    monkeypatch.setattr(progress.jax, "process_index", refuse)
    Display(10, every_process=True, in_bytes=True)


def test_time_left_follows_the_speed_since_the_display_was_entered(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(progress, "time", Clock())
    display = Display(40, 10)
    Clock.now = 150.0
    with display:
        Clock.now = 200.0
        assert display.time_left(20) == "1 min 40 s"  # 10 of 30 steps in 50 s


def test_a_line_with_the_elapsed_time_while_waiting(terminal, capsys):
    display = Display(10)
    with display.waiting("compiling the train step"):
        terminal.now += 72
        display.print("a line above it")
    with display:
        display.update(5, "training")
    waiting, training = plain(capsys.readouterr().out).split("a line above it")
    assert "compiling the train step 0:00" in waiting
    assert "compiling the train step 1:12" in training
    assert "5/10 training" in training.split("1:12")[-1]


def test_waiting_prints_a_plain_line_off_a_terminal(capsys):
    with Display(10).waiting("compiling"):
        pass
    assert capsys.readouterr().out == "compiling\n"


@pytest.mark.parametrize("compiles", [True, False])
def test_a_second_bar_shows_how_long_it_compiles_before_it_advances(terminal, capsys, compiles):
    def shown() -> str:
        display._live.refresh()
        return plain(capsys.readouterr().out).split("0/10")[-1]

    with Display(10) as display:
        with display.subtask("validation", 8, compiles=compiles) as advance:
            terminal.now += 12
            assert re.search(r"0/8 +validation +" + ("compiling 0:12" if compiles else "-:--:--"), shown())
            advance(2)
            terminal.now += 1
            assert re.search(r"2/8 +validation +-:--:--", shown())
        assert "validation" not in shown()


def plain(text: str) -> str:
    """Returns `text` without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
