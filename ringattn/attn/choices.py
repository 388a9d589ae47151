"""Names of the strategies."""

from typing import Literal, get_args

Strategy = Literal["ring", "gather", "ulysses", "usp", "auto"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
