"""Ranks strategies, meshes and rematerializations of a train step, and chooses the values that a config leaves open.

`rank` is the only place that chooses: `scripts/plan.py` and `scripts/train.py` both call it. Its rule: of the
candidates in the order of their estimated step time (`estimate.py`), it chooses the first whose compiled step fits the
memory. The times of compiled steps do not change the choice, because a run would then have to compile every candidate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ringattn import config
from ringattn.cost.minimum import host_bytes
from ringattn.mesh.devices import check_sizes
from ringattn.planning.candidates import RUNGS, STRATEGIES, Candidate, Open, candidates
from ringattn.planning.estimate import NOMINAL, Estimate, Machine, estimate, least_bytes
from ringattn.units import bytes_in_words

EQUAL = 0.005
"""Step times within this relative difference count as equal."""


class Limits(NamedTuple):
    """Memory in bytes; None if unknown."""

    device: int | None
    host: int | None
    """The host's memory per device."""


class Outcome(NamedTuple):
    """A compiled step."""

    refusal: str | None
    """The reason why it does not fit; None if it fits."""
    peak: int | None
    """Bytes per device at the peak; None if unknown."""
    seconds: float | None = None
    """Step time by the compiled schedule; None if unknown."""
    compiled: bool = True
    """False if another candidate's refusal stands for this one."""


@dataclass(frozen=True)
class Ranked:
    """A candidate of a ranking."""

    mesh: dict[str, int]
    strategy: str
    layout: str
    remat: str
    estimated_seconds: float
    step_seconds: float | None
    """Step time by the compiled schedule; None if it was not compiled, or if the speed of the device is unknown."""
    peak: int | None
    """Bytes per device at the peak; None if it was not compiled."""
    fits: bool | None
    """By the compiled step, or False by the least memory that a step needs; None if unknown."""
    chosen: bool
    reason: str
    """The reason why it does not fit, or the parts of the estimated time."""


@dataclass(frozen=True)
class Ranking:
    """The candidates of a step."""

    chosen: Candidate | None
    """None if no candidate fits."""
    candidates: list[Ranked]
    """In the order of their compiled time where it is known, then of their estimated time; last, those that do not
    fit."""
    reasons: list[str]
    """Sentences that say what was chosen, and why."""


class _Estimated(NamedTuple):
    candidate: Candidate
    estimate: Estimate
    least: int
    """Lower bound of the device's memory in bytes."""
    dropped: str | None
    """The reason why the step cannot fit; None if it may fit."""

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key. Times within half a percent count as equal; then come less recomputation and fewer transfers."""
        seconds, candidate = float(f"{self.estimate.seconds:.3g}"), self.candidate
        data, outer, _, tensor = candidate.sizes
        rung, strategy = RUNGS.index(candidate.remat), STRATEGIES.index(candidate.strategy)
        return seconds, rung, self.estimate.transfers, tensor, outer, -data, strategy


def rank(
    c: config.Config,
    devices: Sequence[Any],
    limits: Limits,
    attempt: Callable[[config.Config], Outcome],
    *,
    dimensions: Open,
    compiled: int = 1,
    layouts: bool = False,
) -> Ranking:
    """Ranks the candidates of `c` on `devices`, and chooses one. A single candidate is chosen without compiling it.

    Args:
      devices: JAX devices, which may be compile-only.
      limits: memory of a device and of its host.
      attempt: compiles the step of a config that leaves nothing open.
      dimensions: the values in which candidates differ.
      compiled: number of candidates that fit to compile. They differ in more than the rematerialization.
      layouts: True to estimate other layouts, too, which are neither compiled nor chosen.

    Raises ValueError if no candidate divides over the devices.
    """
    machine, found = Machine.of(devices), _estimated(c, devices, limits, dimensions, layouts)
    possible = [each for each in found if each.dropped is None and each.candidate.layout == c.attention.layout]
    if len(found) == 1 and possible and compiled == 1:
        outcomes, chosen = {}, possible[0].candidate
    else:
        outcomes = _outcomes(c, possible, attempt, compiled)
        chosen = next((candidate for candidate, outcome in outcomes.items() if outcome.refusal is None), None)
    ranked = [_ranked(each, outcomes.get(each.candidate), each.candidate == chosen) for each in found]
    ranked.sort(key=lambda each: (each.fits is False, each.step_seconds is None, each.step_seconds or 0.0))
    return Ranking(chosen, ranked, list(_reasons(found, outcomes, chosen, machine)))


def _outcomes(
    c: config.Config, possible: Sequence[_Estimated], attempt: Callable[[config.Config], Outcome], compiled: int
) -> dict[Candidate, Outcome]:
    """Compiles candidates in order until `compiled` fit, and returns the outcomes in this order.

    First it compiles one of each strategy, so that strategies are compared, then others that differ in the mesh. A
    candidate whose lower bound of the memory is at least that of one of the same strategy and `remat` that does not fit
    is not compiled.
    """
    outcomes: dict[Candidate, Outcome] = {}
    refused: list[_Estimated] = []
    strategies: set[object] = set()
    groups: set[object] = set()
    for each, is_first in [(each, is_first) for is_first in (True, False) for each in possible]:
        candidate = each.candidate
        if len(groups) == compiled:
            break
        if candidate in outcomes or candidate.group in groups or (is_first and candidate.name in strategies):
            continue
        alike = [one for one in refused if one.candidate.kind == candidate.kind and one.least <= each.least]
        if alike:
            reason = f"not compiled: needs at least as much by estimate as {alike[0].candidate}, which does not fit"
            outcomes[candidate] = Outcome(reason, None, compiled=False)
            continue
        outcomes[candidate] = outcome = attempt(candidate.apply(c))
        if outcome.refusal is None:
            groups.add(candidate.group)
            strategies.add(candidate.name)
        elif outcome.peak is not None:
            refused.append(each)
    return outcomes


def _estimated(
    c: config.Config, devices: Sequence[Any], limits: Limits, dimensions: Open, layouts: bool
) -> list[_Estimated]:
    """Returns the candidates with their estimates, in order. Raises ValueError if none divides over the devices."""
    machine, found, errors = Machine.of(devices), [], []
    for candidate in candidates(c, machine, dimensions, layouts):
        sizes = candidate.mesh
        try:
            concrete = candidate.apply(c)
            check_sizes(concrete, sizes)
        except ValueError as error:
            errors.append(error)
            continue
        least = least_bytes(concrete, sizes)
        dropped = _dropped(least, host_bytes(concrete, sizes), limits)
        found.append(_Estimated(candidate, estimate(concrete, sizes, machine), least, dropped))
    if not found:
        raise ValueError(f"{dimensions}: no candidate divides over {len(devices)} devices; the first: {errors[0]}")
    return sorted(found, key=lambda each: (*each.order, each.candidate.layout != c.attention.layout))


def _dropped(device: int, host: int, limits: Limits) -> str | None:
    """Returns why a step cannot fit that needs at least these bytes on the device and on the host; None if it may."""
    for name, needed, limit in (("", device, limits.device), (" of its host", host, limits.host)):
        if limit is not None and needed > limit:
            return f"a device needs at least {bytes_in_words(needed)}{name}, which has {bytes_in_words(limit)}"
    return None


def _ranked(each: _Estimated, outcome: Outcome | None, is_chosen: bool) -> Ranked:
    candidate, fits = each.candidate, None if each.dropped is None else False
    reason = each.dropped or _parts(each.estimate)
    if outcome is not None:
        fits = outcome.refusal is None if outcome.compiled else None
        reason = outcome.refusal or reason
    return Ranked(
        mesh=candidate.mesh,
        strategy=candidate.strategy,
        layout=candidate.layout,
        remat=candidate.remat,
        estimated_seconds=each.estimate.seconds,
        step_seconds=None if outcome is None else outcome.seconds,
        peak=None if outcome is None else outcome.peak,
        fits=fits,
        chosen=is_chosen,
        reason=reason,
    )


def _parts(found: Estimate) -> str:
    shares = {name: seconds / found.seconds for name, seconds in found.named().items()}
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.005)


def _reasons(
    found: Sequence[_Estimated], outcomes: Mapping[Candidate, Outcome], chosen: Candidate | None, machine: Machine
) -> Iterator[str]:
    dropped = sum(each.dropped is not None for each in found)
    devices = f"{machine.devices} {machine.kind} device{'s' * (machine.devices > 1)}"
    yield f"{len(found)} candidates for {devices}, of which {dropped} need too much memory"
    if machine.is_nominal:
        yield f"the speed of {machine.kind} is unknown: estimated for the compute, memory and links of {NOMINAL}"
    for candidate, outcome in outcomes.items():
        if outcome.refusal is not None and outcome.compiled:
            yield f"{candidate}: {outcome.refusal}"
    if chosen is None:
        yield "no candidate fits"
        return
    refused = {candidate for candidate, outcome in outcomes.items() if outcome.refusal is not None}
    possible = [each for each in found if each.dropped is None and each.candidate not in refused]
    yield _why([each for each in possible if each.candidate.layout == chosen.layout], chosen)
    best = next(each for each in found if each.candidate == chosen)
    if possible[0].candidate.layout != chosen.layout and possible[0].order[0] < best.order[0]:
        seconds = f"{possible[0].estimate.seconds:.3g} s"
        yield f"--attention.layout {possible[0].candidate.layout} is estimated to be faster: {seconds}"
    timed = {each: outcome.seconds for each, outcome in outcomes.items() if outcome.seconds and not outcome.refusal}
    fastest = min(timed, key=lambda each: timed[each], default=chosen)
    if chosen in timed and timed[fastest] < timed[chosen] * (1 - EQUAL):
        times = f"{timed[fastest]:.4g} s per step against {timed[chosen]:.4g} s"
        yield f"the compiled schedules disagree with the estimates: {fastest} is the fastest of them, {times}"
    elif len(timed) > 1:
        yield f"the compiled schedules agree: none of {len(timed)} is faster by more than {EQUAL:.1%}"


def _why(found: Sequence[_Estimated], chosen: Candidate) -> str:
    """Returns the reason for the choice: its estimate, and what the next candidate with other values loses.

    Other rematerializations are not compared.
    """
    best = next(each for each in found if each.candidate == chosen)
    text = f"chosen: {chosen}, estimated {best.estimate.seconds:.3g} s per step ({_parts(best.estimate)})"
    others = [each for each in found if each.candidate.group != chosen.group]
    if not others:
        return f"{text}; the only one that can fit"
    other = others[0].estimate
    if others[0].order[0] <= best.order[0]:
        return f"{text}; {others[0].candidate} is estimated at {other.seconds:.3g} s"
    lost = {name: seconds - best.estimate.named()[name] for name, seconds in other.named().items()}
    most = max(lost, key=lambda name: lost[name])
    return f"{text}; next {others[0].candidate} at {other.seconds:.3g} s, with {lost[most]:.3g} s more of {most}"
