"""Evaluates a model on tasks of EleutherAI's lm-eval: python -m ringattn.generation.lm_eval MODEL --tasks TASK ...

MODEL is a Hugging Face directory, a GGUF file or a run directory. Requires pip install 'ringattn[lm-eval]'. Most tasks
download their data. From Python, pass a `RingModel` to `lm_eval.simple_evaluate`.
"""

import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn import config
from ringattn.generation.generator import Generator
from ringattn.runs.files import check_writable, write_json
from ringattn.runs.progress import Display
from ringattn.weights.origin import find_origin

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore
except ImportError as error:
    message = "lm-eval is missing; run pip install 'ringattn[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message) from error

MAX_GENERATED = 256
"""Maximum number of tokens of an answer if a task sets none, as for lm-eval's Hugging Face models."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Values of a task's generation_kwargs that become options of `Generator.generate`."""
_Pair = tuple[Any, list[int], list[int]]
"""A request, the ids of its context and those of its continuation."""


class RingModel(TemplateLM):
    """A model of lm-eval. Contexts that are too long lose their beginning, as for lm-eval's Hugging Face models."""

    def __init__(
        self,
        generator: Generator,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        """Adapts a generator.

        Args:
          generator: its cache holds at least max_length + 1 tokens.
          batch_size: number of rows that are computed together.
          max_length: maximum number of tokens that the model reads. Default: one less than the cache holds.
          add_bos_token: True: contexts begin with `prefix_token_id`. False: they do not. None: they begin as a text of
            the model does. A rolling log-likelihood always reads `prefix_token_id`, and never predicts it.
          prefix_token_id: context of a text without context. Default: what a text of the model begins with, or else its
            end-of-text token.

        Raises ValueError if the model has no tokenizer, or if max_length does not fit the cache.
        """
        super().__init__()
        texts, cache_tokens = generator.served.texts, generator.served.engine.cache_tokens
        if texts.tokenizer is None:
            raise ValueError(f"lm-eval requires a tokenizer: {texts.no_tokenizer}")
        self.generator, self.batch_size = generator, batch_size
        self.max_length = cache_tokens - 1 if max_length is None else max_length
        if not 1 <= self.max_length < cache_tokens:
            fix = f"load the model with cache_tokens={self.max_length + 1}"
            raise ValueError(f"max_length={max_length} must be from 1 to {cache_tokens - 1}, the cache less one; {fix}")
        self._tokenizer = texts.tokenizer
        self._prefix = (*texts.start, self._tokenizer.boundary)[0] if prefix_token_id is None else prefix_token_id
        self._begin = list(texts.start) if add_bos_token is None else [self._prefix] * add_bos_token

    @classmethod
    def load(
        cls, path: str | Path, mesh: config.Mesh | None = None, *, max_length: int | None = None, **options: Any
    ) -> "RingModel":
        """Returns the model at `path`, as of `Generator.load`; max_length is the length that it was trained for.

        The prefix of a text is the begin-of-text token that the checkpoint names, as in lm-eval's Hugging Face models.
        `options` are those of the constructor.
        """
        origin = find_origin(str(path))
        length = origin.context if max_length is None else max_length
        generator = Generator.load(path, mesh, cache_tokens=length + 1, cache_dtype="float32")
        named = origin.begin_id()
        settings: dict[str, Any] = {"max_length": length, "prefix_token_id": named} | options
        return cls(generator, **settings)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._tokenizer.boundary

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's cache of requests."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text. Names of special tokens in it are plain text."""
        begin = [] if add_special_tokens is False else self._begin
        return begin + self._tokenizer.encode(string.encode()).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises ValueError: a chat template becomes token ids here, but lm-eval requires a text."""
        raise ValueError("apply_chat_template is not supported; use scripts/eval.py with --chat True")

    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability in nats of each continuation, and True if it is the greedy one."""
        pairs = [self._truncated(context, continuation) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        with Display(len(pairs), label="log-likelihoods") as display:
            for group in self._batches([len(context) + len(rest) for context, rest in pairs]):
                for number, (nats, greedy) in zip(group, self._score([pairs[n] for n in group]), strict=False):
                    found[number] = float(nats.sum(dtype=float)), greedy
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                display.update(len(found))
        return [found[number] for number in range(len(pairs))]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Any]:
        # A batch of another size would compile other programs.
        return self.generator.scores(pairs + pairs[:1] * (self.batch_size - len(pairs)))

    def _truncated(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Removes the beginning of a context so that the model reads at most `max_length` tokens.

        Raises ValueError if the continuation alone is longer.
        """
        if len(continuation) > self.max_length:
            problem = f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}"
            raise ValueError(f"{problem}; load the model with a larger max_length")
        # The last token of the continuation is predicted, but not read.
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Yields the numbers of the rows of each batch, the longest rows first, so that memory runs out at once."""
        order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        for begin in range(0, len(order), self.batch_size):
            yield order[begin : begin + self.batch_size]

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability in nats of whole texts, each in disjoint windows of `max_length` tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore

        windows: list[_Pair] = []
        owners: list[int] = []
        texts = [request.args[0] for request in requests]
        for number, text in enumerate(texts):
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += nats
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each context, up to a string of `until`. Greedy unless a task samples.

        Raises ValueError for a value of generation_kwargs that is not supported, and if max_gen_toks leaves no room.
        """
        requests = list(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found: dict[int, str] = {}
        with Display(len(requests), label="answers") as display:
            for numbers in groups.values():
                options = generation_options(requests[numbers[0]].args[1])
                prompts = [self._prompt(requests[number].args[0], options["max_tokens"]) for number in numbers]
                for group in self._batches([len(prompt) for prompt in prompts]):
                    rows = [prompts[n] for n in group]
                    rows += rows[:1] * (self.batch_size - len(rows))
                    for n, result in zip(group, self.generator.generate(rows, **options), strict=False):
                        found[numbers[n]] = result.text
                        self.cache_hook.add_partial("generate_until", requests[numbers[n]].args, result.text)
                    display.update(len(found))
        return [found[number] for number in range(len(requests))]

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """Returns the ids of a context without the beginning that does not fit."""
        room = self.max_length - max_tokens
        if room < 1:
            problem = f"max_gen_toks={max_tokens} must be less than max_length={self.max_length}"
            raise ValueError(f"{problem}; load the model with a larger max_length")
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:]


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of `Generator.generate` for a task's generation_kwargs. Raises ValueError for others."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # pyright: ignore

    values = dict(normalize_gen_kwargs(given, MAX_GENERATED))
    stop = [text for text in handle_stop_sequences(values.pop("until", None), eos=None) if text]
    options = {"max_tokens": values.pop("max_gen_toks"), "stop": stop}
    values.pop("do_sample")  # False has set the temperature to 0
    others = values.keys() - set(SAMPLING)
    if others:
        rule = f"supported are until, max_gen_toks, do_sample, {', '.join(SAMPLING)}"
        raise ValueError(f"generation_kwargs: {', '.join(sorted(others))} is not supported; {rule}")
    if values.get("top_k") == 0:  # of transformers: no limit
        del values["top_k"]
    return options | values


@dataclass(frozen=True, kw_only=True)
class Options:
    tasks: tuple[str, ...] | None = None
    """Names of tasks, as of lm-eval. Required."""
    include_path: str | None = None
    """Directory with YAML files of other tasks."""
    num_fewshot: int | None = None
    """Number of examples before each question. Default: that of the task."""
    limit: int | None = None
    """Number of questions per task. Default: all."""
    batch_size: int | None = None
    """Number of rows that are computed together. Default: 8."""
    max_length: int | None = None
    """Maximum number of tokens that the model reads. Default: the length that it was trained for."""
    simulate: int | None = None
    """Number of simulated CPU devices. Default: the real devices."""
    output: str | None = None
    """JSON file for the results."""


def main(argv: Sequence[str]) -> None:
    """Evaluates a model, prints lm-eval's table, and writes the results if asked to."""
    options, (path,) = config.parse_words(Options, ("MODEL",), argv, __doc__ or "")
    with config.reported_errors():
        if not options.tasks:
            raise ValueError("--tasks is required, such as --tasks lambada_openai")
        if options.output is not None:
            check_writable(Path(options.output), "--output")
        manager = task_manager(path, options.tasks, options.include_path)
        mesh = config.Mesh(simulate=options.simulate or 0)
        model = RingModel.load(path, mesh, max_length=options.max_length, batch_size=options.batch_size or 8)
        found = evaluated(model, options.tasks, manager, options)
        if options.output is not None:
            write_json(Path(options.output), {name: found[name] for name in ("results", "versions", "n-samples")})


def task_manager(path: str, tasks: Sequence[str], include_path: str | None) -> Any:
    """Returns lm-eval's task manager. Raises ValueError for an unknown task."""
    from lm_eval.tasks import TaskManager  # pyright: ignore

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include_path {include_path} is not a directory; use one with YAML files of tasks")
    # Tasks that generate their data measure it with a tokenizer, which they load from `pretrained`.
    manager = TaskManager(include_path=include_path, metadata={"pretrained": path})
    for name in tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "use a task of lm-eval, or of --include_path"
            raise ValueError(f"--tasks: unknown {name!r}: {fix}")
    return manager


def evaluated(model: RingModel, tasks: Sequence[str], manager: Any, options: Options) -> dict[str, Any]:
    """Returns lm-eval's results, and prints their table."""
    from lm_eval import simple_evaluate  # pyright: ignore
    from lm_eval.utils import make_table  # pyright: ignore

    found = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=options.num_fewshot, limit=options.limit, task_manager=manager
    )
    assert found is not None
    print(make_table(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
