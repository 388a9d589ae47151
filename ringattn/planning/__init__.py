"""Plans steps of training and of decoding: compiles them for devices that need not be present, and reports memory,
transfers and time.

.. include:: README.md
"""

from ringattn.planning.choice import choose, plan
from ringattn.planning.compile import Plan, compile_plan, prepare
from ringattn.planning.decoding import DecodePlan, plan_decode
from ringattn.planning.reach import max_context
from ringattn.planning.report import report, write_report

__all__ = [
    "DecodePlan",
    "Plan",
    "choose",
    "compile_plan",
    "max_context",
    "plan",
    "plan_decode",
    "prepare",
    "report",
    "write_report",
]
