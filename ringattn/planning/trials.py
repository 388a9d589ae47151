"""Compiles changes of a step that does not fit."""

import time
from collections.abc import Callable
from dataclasses import replace

from ringattn import config
from ringattn.planning.changes import Change, changed_steps, lacks_host
from ringattn.planning.compile import Target
from ringattn.planning.parallel import compile_all, needed_apart
from ringattn.planning.reach import Measure
from ringattn.planning.resize import resized
from ringattn.units import duration_in_words


def try_changes(
    c: config.Config, target: Target, refusal: str, say: Callable[[str], None], measure: Measure = needed_apart
) -> list[Change]:
    """Compiles each change of a step that was refused, in order of estimated effect; returns them by their effect.

    Changes with which the step fits come first, then those that need the least memory. Reports each with the elapsed
    time.
    """
    began = time.monotonic()
    jobs = [
        (change, changed, target if topology is None else resized(changed, target, topology))
        for change, changed, topology in changed_steps(c, target.mesh, target.topology, refusal)
    ]

    def attempt(job: tuple[Change, config.Config, Target]) -> Change:
        change, changed, place = job
        change = replace(change, tried=measure(changed, place))
        say(f"[{duration_in_words(time.monotonic() - began)}] {change}")
        return change

    tried = compile_all(attempt, [(change, changed, place) for change, changed, place in jobs if place is not None])
    kind = "host" if lacks_host(refusal) else "peak"

    def effect(change: Change) -> tuple[bool, bool, int]:
        assert change.tried is not None
        size = vars(change.tried)[kind]
        return change.tried.refusal is not None, size is None, size or 0

    return sorted(tried, key=effect)
