"""Converts weights: python scripts/convert.py SOURCE TARGET [--to huggingface|run]

SOURCE is a run directory, one of its checkpoints, a Hugging Face directory or a GGUF file. TARGET is the directory to
create: a Hugging Face directory, which transformers loads, or a run directory, which scripts/eval.py evaluates. Both
hold the model in float32 in the memory of this machine; no accelerator is used.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals("run the same command again to start over")

import sys
from dataclasses import dataclass
from typing import Literal

from ringattn import config, weights
from ringattn.runs.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Options:
    to: Literal["huggingface", "run"] | None = None
    """Kind of TARGET. Default: huggingface."""


def main() -> None:
    options, (source, target) = config.parse_words(Options, ("SOURCE", "TARGET"), sys.argv[1:], __doc__ or "")
    with config.reported_errors():
        weights.check_target(target)
        with progress_bar("loading", in_bytes=True, every_process=True) as advance:
            loaded = weights.load(source, config.Mesh(simulate=1), advance)
        with progress_bar("writing", in_bytes=True, every_process=True) as advance:
            if options.to == "run":
                weights.save_run(loaded, target)
            else:
                weights.save(loaded, target, advance)
    print(f"{target}: {loaded.config.family} model of {weights.count_parameters(loaded.params):,} parameters")


if __name__ == "__main__":
    main()
