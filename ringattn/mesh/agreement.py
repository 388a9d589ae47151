"""Agreement of the processes on a number."""

from itertools import count

import jax

from ringattn.mesh import board
from ringattn.mesh.processes import gather, several_processes

_instances = count()


class Agreement:
    """Gives all processes a number that one of them has passed, at the same call.

    Between two calls, each process must dispatch a computation of all devices. A process is then ahead of the others by
    at most as many calls as it dispatches computations before it waits for a result.

    Processes exchange texts and not arrays: on CPU, XLA may confuse the collectives of two programs that run at the
    same time.
    """

    def __init__(self) -> None:
        """All processes must create their instances in the same order."""
        self._directory, self._calls, self._posted = f"agreement/{next(_instances)}/", 0, False

    def __call__(self, number: int, *, ahead: int = 1, computed: bool = True) -> int:
        """Returns `number` in a single process. With several, returns the number of one of them, or 0.

        All processes must call it equally often, with the same arguments but `number`.

        Args:
          number: passed on to all processes, unless 0. They get it `ahead` + 1 calls later.
          ahead: maximum number of calls by which another process may be ahead.
          computed: False if there was no computation since the last call. Such a call has no effect.
        """
        if not several_processes():
            return number
        if not computed:
            return 0
        self._calls += 1
        if number and not self._posted:
            board.post(f"{self._directory}{jax.process_index()}", f"{self._calls + ahead + 1} {number}")
            self._posted = True
        posted = [tuple(map(int, text.split())) for text in board.read(self._directory).values()]
        return max((number for call, number in posted if call <= self._calls), default=0)

    def now(self, number: int) -> int:
        """Returns the maximum of the numbers that the processes pass to this call, for which it waits."""
        return max(map(int, gather(str(number))))
