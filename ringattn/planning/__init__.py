"""Plans of training steps: compiled for devices that need not be present, with the memory each device needs.

.. include:: README.md
"""

from ringattn.planning.compile import Plan, plan, report

__all__ = ["Plan", "plan", "report"]
