"""Plans training steps: compiles them for devices that need not be present, and reports the memory per device.

.. include:: README.md
"""

from ringattn.planning.compile import Plan, plan, report

__all__ = ["Plan", "plan", "report"]
