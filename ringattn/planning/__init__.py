"""Plans steps of training and of decoding: compiles them for devices that need not be present,
and reports the memory per device.

.. include:: README.md
"""

from collections.abc import Iterator

from ringattn.planning.compile import Plan, plan, report_step
from ringattn.planning.decoding import DecodePlan, plan_decode, report_decode


def report(plan: Plan | DecodePlan) -> Iterator[str]:
    """Yields the lines of a plan's report."""
    return report_decode(plan) if isinstance(plan, DecodePlan) else report_step(plan)


__all__ = ["DecodePlan", "Plan", "plan", "plan_decode", "report"]
