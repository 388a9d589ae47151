"""What a run would take on devices that are not there, by the compiler that would compile it for them."""

from ringattn.planning.compile import Plan, plan, report

__all__ = ["Plan", "plan", "report"]
