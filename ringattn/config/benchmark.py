"""What a benchmark compares: subjects as short strings, row lengths, ring sizes; it checks itself. Knows no arrays."""

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

from ringattn.config.checks import at_least, check_folder_name, check_types, nearest_multiples, require
from ringattn.config.sections import Layout

STRATEGIES = ("ring", "gather", "ulysses")
OTHERS = ("dense", "ringattention")
"""jax.nn.dot_product_attention on one device, and the PyPI package of that name."""
BASES = (*(f"{strategy} {layout}" for strategy in STRATEGIES for layout in get_args(Layout)), *OTHERS)


@dataclass(frozen=True)
class Subject:
    """One thing that is timed: 'ring zigzag', 'ring contiguous window=512', 'ringattention documents=16', 'dense'."""

    method: str
    layout: str = "contiguous"
    window: int | None = None
    """How many tokens back a token sees; None: all of its document."""
    documents: int = 1
    """Equal documents that a row holds; a token sees its own alone."""


def parse_subject(text: str) -> Subject:
    """The subject that `text` names: a strategy and a layout, or 'dense' or 'ringattention'; then its options.

    Options are window=N (keys that a token sees behind itself) and documents=N (in a row). Raises ValueError that
    names the nearest valid text.
    """
    words = text.split()
    base = " ".join(word for word in words if "=" not in word)
    options = [word for word in words if "=" in word]
    if base not in BASES:
        near = difflib.get_close_matches(base, BASES, n=1, cutoff=0.3)
        cure = f"did you mean {' '.join([*near, *options])!r}?" if near else f"valid are {', '.join(BASES)}"
        raise ValueError(f"unknown subject {text!r}: {cure}")
    method, *layout = base.split()
    taken = {"dense": (), "ringattention": ("documents",)}.get(method, ("window", "documents"))
    found: dict[str, int] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in taken:
            near = difflib.get_close_matches(name, taken, n=1)
            cure = f"did you mean {text.replace(option, f'{near[0]}={value}')!r}?" if near else _allowed(base, taken)
            raise ValueError(f"unknown {option!r} in subject {text!r}: {cure}")
        least = 1 if name == "documents" else 0
        if name in found or not value.isdecimal() or int(value) < least:
            raise ValueError(f"subject {text!r}: {option!r} must be {name}=N once, N an integer of at least {least}")
        found[name] = int(value)
    layout_name = layout[0] if layout else "contiguous"
    return Subject(method, layout_name, found.get("window"), found.get("documents", 1))


def _allowed(base: str, taken: tuple[str, ...]) -> str:
    return f"{base!r} takes {' and '.join(f'{name}=N' for name in taken) or 'no options'}"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    name: str = "benchmark"
    """Name of the run: its folder inside `directory`."""
    directory: str = "runs"
    """Folder that holds the run's own folder."""
    simulate: int = 0
    """Run on this many simulated CPU devices; 0: on the devices there are."""
    rings: tuple[int, ...] = (-1,)
    """Ring sizes, each over the first so many devices; -1: over all."""
    shard_tokens: tuple[int, ...] = (1024,)
    """Tokens on each device of the ring; a row has as many times the ring's size."""
    subjects: tuple[str, ...] = ("ring zigzag", "dense")
    """What is timed: 'ring|gather|ulysses contiguous|striped|zigzag [window=N] [documents=N]', 'dense',
    'ringattention [documents=N]'."""
    baselines: tuple[str, ...] = ("dense",)
    """Subjects that the others' speed is compared with."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 8
    """Key/value heads (G); heads must be a multiple."""
    head_dim: int = 64
    """Width of a head (D)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of queries, keys and values."""
    seconds: int = 60
    """How long each length and ring is measured, once compiled; at least three rounds are."""

    def __post_init__(self) -> None:
        check_types(self)
        check_folder_name(self, "name")
        require(bool(self.directory), self, "directory", "a folder, such as 'runs'")
        at_least(0, self, "simulate", "seconds")
        at_least(1, self, "heads", "kv_heads", "head_dim")
        require(all(ring >= 1 or ring == -1 for ring in self.rings), self, "rings", "at least 1, or -1 for all devices")
        require(min(self.shard_tokens) >= 1, self, "shard_tokens", "at least 1")
        for name in ("rings", "shard_tokens", "subjects", "baselines"):
            require(len(set(vars(self)[name])) == len(vars(self)[name]), self, name, "different from one another")
        for text in self.subjects:
            parse_subject(text)
        for text in self.baselines:
            rule = f"among the subjects: use one of {', '.join(map(repr, self.subjects))}"
            require(text in self.subjects, self, "baselines", rule)
        multiple = f"a multiple of kv_heads={self.kv_heads}: use {nearest_multiples(self.heads, self.kv_heads)}"
        require(self.heads % self.kv_heads == 0, self, "heads", multiple)
