"""Plots of a run and of its evaluations: what they show, read from the figures."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ringattn import palette
from ringattn.evaluation.plots import by_kind, by_position, exact_match
from ringattn.training.plots import plot_loss, running_mean


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
        plot_loss(rows, tmp_path / "plots" / "loss.png", "example")
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


def steps(first, losses, stage=1):
    return [{"step": step, "stage": stage, "loss": loss} for step, loss in enumerate(losses, first)]


def test_titles_grids_and_colours(draw):
    figure = draw([*steps(1, [3.0, 2.0]), validation(2, 3.0, 2.0)])
    assert figure.get_suptitle() == "Loss of run example"
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert all(line.get_visible() for line in axes.get_xgridlines() + axes.get_ygridlines())
    training, validations = figure.axes[0].lines
    assert (training.get_color(), validations.get_color()) == (palette.BLUE, palette.VERMILION)
    assert {palette.BLUE, palette.VERMILION} < set(palette.COLOURS)


def test_the_training_loss_is_plotted_raw_and_smoothed(draw):
    """The mean over a tenth of 40 points: 2 on either side. Raw values are faint."""
    losses = [3.0 + (-1) ** step for step in range(40)]
    raw, smoothed, *_ = draw(steps(1, losses)).axes[0].lines
    assert list(raw.get_ydata()) == losses
    assert (raw.get_alpha(), smoothed.get_alpha()) == (0.3, None)
    assert smoothed.get_label() == "training, mean of 5 logged steps"
    assert smoothed.get_ydata()[2:-2] == pytest.approx([sum(losses[i - 2 : i + 3]) / 5 for i in range(2, 38)])
    assert list(smoothed.get_xdata()) == list(range(1, 41))


def test_a_short_run_is_not_smoothed(draw):
    (training,) = (line for line in draw(steps(1, [3.0, 9.0, 2.0])).axes[0].lines if len(line.get_xdata()))
    assert list(training.get_ydata()) == [3.0, 9.0, 2.0]
    assert training.get_label() == "training"
    assert training.get_alpha() is None


def test_a_single_step_is_visible(draw):
    assert draw(steps(1, [3.0])).axes[0].lines[0].get_marker() == "o"


def test_means_do_not_extend_over_two_stages(draw):
    """The loss jumps where the next stage has other data. A dotted line marks it."""
    axes = draw([*steps(1, [2.0] * 30), validation(30, 3.0), *steps(31, [5.0] * 30, stage=2)]).axes[0]
    assert axes.lines[1].get_ydata() == pytest.approx([2.0] * 30 + [5.0] * 30)
    (end,) = (line for line in axes.lines if line.get_label() == "end of a stage")
    assert list(end.get_xdata()) == [30, 30]


def test_steps_without_a_loss_are_left_out(draw):
    """A batch without unmasked targets has none."""
    assert list(draw(steps(1, [3.0, None, 2.0])).axes[0].lines[0].get_xdata()) == [1, 3]


def test_the_running_mean():
    values = [8.0, 4.0, 2.0, 3.0, 1.0, 5.0]
    assert list(running_mean(values, 0)) == values
    # The first value alone; then three; at the end those that there are.
    expected = [8.0, 14 / 3, 18 / 5, 15 / 5, 11 / 4, 9 / 3]
    assert running_mean(values, 2) == pytest.approx(expected)
    falling = [10.0 - step for step in range(9)]
    assert running_mean(falling, 2)[:-2] == pytest.approx(falling[:-2])  # no lag
    assert running_mean([], 2).size == 0


def test_without_a_validation_the_plot_by_context_is_omitted(draw):
    assert len(draw([{"step": 1, "stage": 1, "loss": 2.0}]).axes) == 1


def test_with_a_single_context_range_the_plot_by_context_is_omitted(draw):
    rows = [{"step": 1, "stage": 1, "loss": 2.0}, validation(1, 3.0), validation(2, 2.0)]
    assert len(draw(rows).axes) == 1
    assert len(draw([*rows, validation(3, 2.0, 1.0)]).axes) == 2


def evaluated(change):
    """Results of a run by task, and the loss of two kinds of document."""
    exact = {"task": "passkey", "depth": None, "rate": 0.5 + change, "low": 0.4 + change, "high": 0.6 + change}
    kinds = [{"kind": kind, "loss": 2.0 + change} for kind in ("email", "json")]
    results = [exact | {"length": length} for length in (64, 128)]
    return [*results, {"task": "loss_by_kind", "depth": None, "length": 128, "kinds": kinds}]


@pytest.mark.parametrize(
    ("plot", "title"),
    [
        (lambda runs: exact_match(runs, ["passkey"]), "Exact match by length"),
        (by_kind, "Loss by kind of document in rows of 128 tokens"),
    ],
)
def test_plots_of_evaluations_have_a_title_a_grid_and_the_names_of_runs(plot, title):
    one, two = plot({"a": evaluated(0.0)}).axes[0], plot({"a": evaluated(0.0), "b": evaluated(0.1)}).axes[0]
    assert one.get_title() == f"{title}\nrun a"
    assert two.get_title() == title
    assert [text.get_text().removeprefix("passkey, ") for text in two.get_legend().get_texts()] == ["a", "b"]
    assert all(line.get_visible() for line in two.get_ygridlines())
    colours = [to_hex(part.get_facecolor()) for part in two.patches] or [two.lines[0].get_color()]
    assert set(colours) <= {colour.lower() for colour in palette.COLOURS} | set(palette.COLOURS)


def test_two_runs_of_one_length_have_colours_of_their_own_and_the_first_tokens_do_not_scale_the_axis():
    ranges = [(0, 127, 20.0), (128, 511, 2.0), (512, 1023, 1.0)]
    parts = [{"first": first, "last": last, "loss": loss, "error": 0.1} for first, last, loss in ranges]
    result = {"task": "loss_by_position", "depth": None, "length": 1024, "loss": 1.0, "by_position": parts}
    (axes,) = by_position({"before": [result], "after": [result]}).axes
    assert [line.get_color() for line in axes.lines] == list(palette.COLOURS[:2])
    assert axes.get_ylim() == (0, pytest.approx(2.6))
    (axes,) = by_position({"before": [result, result | {"length": 2048}]}).axes
    assert [line.get_color() for line in axes.lines] == list(palette.COLOURS[:2])
    (axes,) = by_position({"short": [result | {"length": 128, "by_position": parts[:1]}]}).axes
    assert axes.get_ylim()[1] > 20
