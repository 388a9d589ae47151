"""Checked access to the values of a model's config: every value is typed, and no value is ignored silently."""

from collections.abc import Mapping
from typing import Any

from ringattn.config.checks import described, fits
from ringattn.weights.untrusted import printable, shortened

REQUIRED = object()
"""Default of a value that must be present."""


class Values:
    """The values of a JSON object or of GGUF metadata. Counts which ones have been used.

    A value that is null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        """`source` is the name of the file in messages."""
        self.values, self.source = {name: value for name, value in values.items() if value is not None}, source
        self._absent = {name for name, value in values.items() if value is None}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def is_null(self, name: str) -> bool:
        """Returns True if the value is present and null, which some configs distinguish from an absent one."""
        return name in self._absent

    def take(self, name: str, kind: Any, default: Any = REQUIRED) -> Any:
        """Returns a value of type `kind`; `default` if it is absent. Raises ValueError for another type."""
        self._used.add(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise self.error(name, "is missing", "download the file again")
        if name in self.values and not fits(value, kind):
            rule = "an object" if kind is dict else described(kind)
            raise self.error(f"{name}={shortened(value)}", f"must be {rule}", "download the file again")
        if type(value) is int and abs(value) >= 2**63:
            raise self.error(f"{name}={shortened(value)}", "must fit 64 bits", "download the file again")
        return float(value) if kind is float and value is not None else value

    def refuse_other(self, name: str, accepted: tuple[Any, ...], reason: str) -> None:
        """Raises ValueError unless the value is absent or one of `accepted`."""
        self._used.add(name)
        value = self.values.get(name)
        if name in self.values and not any(type(value) is type(each) and value == each for each in accepted):
            rule = f"is not supported: {reason}"
            raise self.error(f"{name}={shortened(value)}", rule, f"use a model with {name}={accepted[0]!r}")

    def refuse_unused(self, harmless: frozenset[str]) -> None:
        """Raises ValueError if a value has been neither used nor is `harmless`: it might change the computation."""
        unused = [name for name in self.values if name not in self._used and name not in harmless]
        if unused:
            listed = ", ".join(f"{printable(name)}={shortened(self.values[name])}" for name in unused[:8])
            more = f" and {len(unused) - 8} more" * (len(unused) > 8)
            problem = "may change what the model computes, and ringattn does not know it"
            raise self.error(f"{listed}{more}", problem, "remove it from the file if it does not")

    def error(self, subject: str, problem: str, fix: str) -> ValueError:
        return ValueError(f"{self.source}: {subject} {problem}; {fix}")
