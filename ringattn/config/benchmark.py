"""Config of an attention benchmark: subjects (methods to time), lengths and ring sizes."""

import difflib
from dataclasses import dataclass
from typing import get_args

from ringattn.config.checks import (
    at_least,
    check_directory_name,
    check_distinct,
    check_types,
    nearest_multiples,
    require,
    section,
)
from ringattn.config.choices import Dtype, Layout

METHODS = ("ring", "gather", "ulysses")
"""Strategies over a single mesh axis."""
RIVALS = ("dense", "ringattention")
"""jax.nn.dot_product_attention on one device, and the PyPI package ringattention."""
BASES = (*(f"{method} {layout}" for method in METHODS for layout in get_args(Layout)), *RIVALS)


@dataclass(frozen=True)
class Subject:
    """A method to time: 'ring zigzag', 'ring contiguous window=512', 'ringattention documents=16', 'dense'."""

    method: str
    layout: str = "contiguous"
    window: int | None = None
    """Sliding window: number of preceding tokens a token attends to, besides itself. None: no window."""
    documents: int = 1
    """Number of equally long documents packed into a row. Tokens attend only within their document."""


def parse_subject(text: str) -> Subject:
    """Parses 'STRATEGY LAYOUT', 'dense' or 'ringattention', followed by options.

    The options are window=N (preceding tokens a token attends to) and documents=N (documents per row). Raises
    ValueError that suggests the nearest valid subject.
    """
    words = text.split()
    base = " ".join(word for word in words if "=" not in word)
    options = [word for word in words if "=" in word]
    if base not in BASES:
        near = difflib.get_close_matches(base, BASES, n=1, cutoff=0.3)
        fix = f": did you mean {' '.join([*near, *options])!r}?" if near else f"; use one of {', '.join(BASES)}"
        raise ValueError(f"unknown subject {text!r}{fix}")
    method, *layout = base.split()
    accepted = {"dense": (), "ringattention": ("documents",)}.get(method, ("window", "documents"))
    values: dict[str, int] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            corrected = text.replace(option, f"{near[0]}={value}") if near else ""
            fix = f"did you mean {corrected!r}?" if near else _accepted_options(base, accepted)
            raise ValueError(f"unknown {option!r} in subject {text!r}: {fix}")
        minimum = 1 if name == "documents" else 0
        if name in values or not value.isdecimal() or int(value) < minimum:
            raise ValueError(
                f"subject {text!r}: {option!r} must be {name}=N, given once, with an integer N >= {minimum}"
            )
        values[name] = int(value)
    return Subject(method, layout[0] if layout else "contiguous", **values)


def _accepted_options(base: str, names: tuple[str, ...]) -> str:
    return f"{base!r} takes {' and '.join(f'{name}=N' for name in names) or 'no options'}"


@section()
class Benchmark:
    name: str = "benchmark"
    """Name of the benchmark and of its output directory."""
    directory: str = "runs"
    """Parent of the output directory."""
    simulate: int = 0
    """Number of simulated CPU devices. 0: use the real devices."""
    rings: tuple[int, ...] = (-1,)
    """Ring sizes. A ring of size N uses the first N devices; -1: all devices."""
    shard_tokens: tuple[int, ...] = (1024,)
    """Tokens per device. The row length is this number times the ring size."""
    subjects: tuple[str, ...] = ("ring zigzag", "dense")
    """Methods to time: 'ring|gather|ulysses contiguous|striped|zigzag [window=N] [documents=N]', 'dense',
    'ringattention [documents=N]'."""
    baselines: tuple[str, ...] = ("dense",)
    """Baselines: subjects to compare with. The speedup of every subject over each baseline is reported."""
    heads: int = 8
    """Number of query heads (H); must be a multiple of kv_heads."""
    kv_heads: int = 8
    """Number of key/value heads (G)."""
    head_dim: int = 64
    """Head dimension (D)."""
    dtype: Dtype = "float32"
    """Dtype of queries, keys and values."""
    seconds: int = 60
    """Measurement time per row length and ring size, in seconds, excluding compilation. At least three rounds run."""
    topology: str | None = None
    """TPU topology, such as v5e:2x4. Counts cycles with the TPU compiler instead of measuring time; needs no TPU. Takes
    the first of shard_tokens, one ring over all devices, and ignores simulate, rings, baselines and seconds."""
    steps: tuple[str, ...] | None = None
    """With topology: training steps to compile, each as 'CONFIG TOPOLOGY'. None: no step."""

    def __post_init__(self) -> None:
        check_types(self)
        check_directory_name(self, "name")
        require(bool(self.directory), self, "directory", "a directory, such as 'runs'")
        at_least(0, self, "simulate", "seconds")
        at_least(1, self, "heads", "kv_heads", "head_dim")
        require(
            all(ring >= 1 or ring == -1 for ring in self.rings), self, "rings", "at least 1 each, or -1 for all devices"
        )
        require(min(self.shard_tokens) >= 1, self, "shard_tokens", "at least 1 each")
        check_distinct(self, "rings", "shard_tokens", "subjects", "baselines")
        for text in self.subjects:
            parse_subject(text)
        for text in self.baselines:
            rule = f"chosen from the subjects; use one of {', '.join(map(repr, self.subjects))}"
            require(text in self.subjects, self, "baselines", rule)
        for text in self.steps or ():
            rule = "each 'CONFIG TOPOLOGY', such as 'configs/llama3_8b_1m.py v5e:8x8'"
            require(len(text.split()) == 2, self, "steps", rule)
        require(self.steps is None or self.topology is not None, self, "steps", "None without topology")
        multiple = f"a multiple of kv_heads={self.kv_heads}; use {nearest_multiples(self.heads, self.kv_heads)}"
        require(self.heads % self.kv_heads == 0, self, "heads", multiple)
