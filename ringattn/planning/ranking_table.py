"""The table of a ranking in a report."""

from collections.abc import Iterator, Sequence

from ringattn.mesh.axes import describe_sizes
from ringattn.planning.candidates import strategy_name
from ringattn.planning.rank import Ranked
from ringattn.units import bytes_in_words

HEADER = ("", "strategy", "layout", "mesh", "remat", "estimated s", "compiled s", "peak", "fits", "reason")


def ranked_cells(each: Ranked) -> tuple[str, ...]:
    """Returns the cells of a candidate; the chosen one is marked with an asterisk."""
    return (
        "*" if each.chosen else "",
        strategy_name(each.strategy, each.mesh),
        each.layout,
        describe_sizes(each.mesh),
        each.remat,
        f"{each.estimated_seconds:.3g}",
        "" if each.step_seconds is None else f"{each.step_seconds:.3g}",
        "" if each.peak is None else bytes_in_words(each.peak),
        {True: "yes", False: "no", None: ""}[each.fits],
        each.reason,
    )


def ranking_lines(ranking: Sequence[Ranked], reasons: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a ranking for the terminal; none if it is empty."""
    if not ranking:
        return
    yield "ranking, by compiled and then by estimated time:"
    shown: list[Ranked] = []
    for each in ranking:  # the compiled ones, and the first of each other strategy and layout
        named = [(strategy_name(other.strategy, other.mesh), other.layout) for other in shown]
        if _is_compiled(each) or (strategy_name(each.strategy, each.mesh), each.layout) not in named:
            shown.append(each)
    table = [HEADER, *map(ranked_cells, shown)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
    if len(shown) < len(ranking):
        yield f"  and {len(ranking) - len(shown)} more in report.md"
    yield from (f"  {line}" for line in reasons)


def _is_compiled(each: Ranked) -> bool:
    return each.chosen or each.fits is True or each.peak is not None
