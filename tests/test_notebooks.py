"""Every notebook runs from top to bottom, and is kept with its outputs, small, and with a way into Colab."""

import copy
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
FILE, OUTPUT, SECONDS = 400_000, 130_000, 300
"""Bytes of a notebook and of the output of one of its cells, at most; seconds in which it must run."""
QUOTING = {"03_memory_and_reach"}
"""Notebooks that quote rows of the README's tables."""

pytestmark = [
    pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem),
    # What Jupyter's own modules warn of, about themselves; a warning in a notebook's cell is an output, tested below.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_core"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:zmq"),
]


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell shows: a stream's name, or the formats of what it displays."""
    return {kind for output in cell.outputs for kind in ([output.name] if "name" in output else output.get("data", ()))}


def test_it_runs(path, tmp_path, monkeypatch):
    """In a copy and a process of its own, in which nothing has yet told JAX what to do."""
    stored, notebook = read(path), copy.deepcopy(read(path))
    for cell in code(notebook):
        cell.outputs = []
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    began = time.monotonic()
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    assert time.monotonic() - began < SECONDS
    for fresh, kept in zip(code(notebook), code(stored), strict=True):
        assert "stderr" not in kinds(fresh), fresh.outputs
        assert kinds(fresh) == kinds(kept), f"run it again and keep its outputs: {kept.source}"


def test_outputs_are_kept_and_small(path):
    notebook = read(path)
    assert path.stat().st_size < FILE
    assert len(notebook.cells) <= 25
    shown = set().union(*map(kinds, code(notebook)))
    assert "stdout" in shown
    assert shown & {"image/png", "image/svg+xml"}
    for number, cell in enumerate(code(notebook)):
        assert cell.execution_count == number + 1, "run from top to bottom"
        assert len(str(cell.outputs)) < OUTPUT
        assert not [output for output in cell.outputs if output.output_type == "error"]


def test_it_opens_in_colab(path):
    """The address is pyproject's, in the notebooks and in the README."""
    there = ADDRESS.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{there}/blob/main/notebooks/{path.name}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(badge)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert link in readme
    assert f"(notebooks/{path.name})" in readme
    addresses = set(re.findall(r"github\.com/([\w.-]+/[\w.-]+)|/github/([\w.-]+/[\w.-]+)", path.read_text() + readme))
    ours = {name for pair in addresses for name in pair if name.endswith("/ringattn")}
    assert ours == {there}


def test_what_is_quoted_of_the_readme_is_there(path):
    """Figures that a notebook cannot find by itself, such as those that need the TPU's compiler."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    quoting = [cell.source for cell in read(path).cells if cell.cell_type == "markdown" and "README.md" in cell.source]
    rows = [line for source in quoting for line in source.splitlines() if line.startswith("|")]
    assert bool(rows) == (path.stem in QUOTING)
    assert [row for row in rows if row not in readme] == []


@pytest.mark.parametrize(
    ("devices", "extra"), [({"/dev/accel0"}, "[tpu]"), ({"/dev/nvidia0"}, "[cuda]"), (set(), "")], ids=str
)
def test_colab_gets_what_fits_its_accelerator(path, devices, extra, monkeypatch, capsys):
    install = code(read(path))[0].source
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in devices)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [each for each in devices if Path(each).match(pattern)])
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    exec(install, {})
    assert not ran, "elsewhere it does nothing"
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(install, {})
    assert ran[-1][-1] == f"ringattn{extra} @ git+{ADDRESS}"
    assert len(ran) == (1 if extra else 2)
    assert "Restart" not in capsys.readouterr().out
    monkeypatch.setattr(sys.modules["jax"], "__version__", "0.7.2")
    exec(install, {})
    assert "Restart" in capsys.readouterr().out


def test_all_begin_alike(path):
    """The cells that install and that simulate devices are the same everywhere."""
    assert [cell.source for cell in code(read(path))[:2]] == [cell.source for cell in code(read(NOTEBOOKS[0]))[:2]]
