"""The plot of a run: its curves, read from the figure."""

import pytest
from matplotlib.figure import Figure

from ringattn.training.plots import plot_loss


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """draw(rows): the figure that plot_loss saves."""
    figures = []
    save = Figure.savefig

    def saved(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)

    def draw_rows(rows):
        plot_loss(rows, tmp_path / "plots" / "loss.png")
        assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw_rows


def validation(step, *losses):
    names = ("0-63", "64-127", "128-255")
    by_context = {f"eval/loss/{name}": loss for name, loss in zip(names, losses, strict=False)}
    return {"step": step, "stage": 1, "eval/loss": 1.0} | by_context


def test_losses_by_step_and_by_context(draw):
    rows = [{"step": step, "stage": 1, "loss": 5.0 - step} for step in range(1, 4)]
    rows += [validation(10 * number, 3.0, 2.0 - number) for number in range(1, 10)] + [validation(100, 3.0, 2.5, 2.0)]
    left, right = draw(rows).axes
    assert list(left.lines[0].get_ydata()) == [4.0, 3.0, 2.0]
    assert [line.get_label() for line in right.lines] == ["step 10", "step 40", "step 70", "step 100"]
    assert list(right.lines[-1].get_ydata()) == [3.0, 2.5, 2.0]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "64", "128"]


def test_without_a_validation_the_plot_by_context_is_omitted(draw):
    assert len(draw([{"step": 1, "stage": 1, "loss": 2.0}]).axes) == 1


def test_with_a_single_context_range_the_plot_by_context_is_omitted(draw):
    rows = [{"step": 1, "stage": 1, "loss": 2.0}, validation(1, 3.0), validation(2, 2.0)]
    assert len(draw(rows).axes) == 1
    assert len(draw([*rows, validation(3, 2.0, 1.0)]).axes) == 2
