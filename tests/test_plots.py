import pytest
from matplotlib.figure import Figure

from ringattn.training.plots import plot_loss


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(rows): the figure that plot_loss saves."""
    figures = []
    save = Figure.savefig

    def saved(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)

    def draw(rows):
        plot_loss(rows, tmp_path / "plots" / "loss.png")
        assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def evaluation(step, *losses):
    names = ("0-63", "64-127", "128-255")
    by_context = {f"eval/loss/{name}": loss for name, loss in zip(names, losses, strict=False)}
    return {"step": step, "stage": 1, "eval/loss": 1.0} | by_context


def test_by_step_and_by_context(drawn):
    rows = [{"step": step, "stage": 1, "loss": 5.0 - step} for step in range(1, 4)]
    rows += [evaluation(10 * number, 3.0, 2.0 - number) for number in range(1, 10)] + [evaluation(100, 3.0, 2.5, 2.0)]
    left, right = drawn(rows).axes
    assert list(left.lines[0].get_ydata()) == [4.0, 3.0, 2.0]
    assert [line.get_label() for line in right.lines] == ["step 10", "step 40", "step 70", "step 100"]
    assert list(right.lines[-1].get_ydata()) == [3.0, 2.5, 2.0]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "64", "128"]


def test_without_an_evaluation_there_is_one_picture(drawn):
    assert len(drawn([{"step": 1, "stage": 1, "loss": 2.0}]).axes) == 1


def test_of_a_single_range_of_contexts_there_is_one_picture(drawn):
    rows = [{"step": 1, "stage": 1, "loss": 2.0}, evaluation(1, 3.0), evaluation(2, 2.0)]
    assert len(drawn(rows).axes) == 1
    assert len(drawn([*rows, evaluation(3, 2.0, 1.0)]).axes) == 2
