"""Generates text: python scripts/generate.py --config FILE | --run DIRECTORY | --weights PATH [--option VALUE ...]

Prints the answer while it is generated, and then, to standard error, the speed and the size of the cache. The prompt is
--prompt, --prompt_file or standard input.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals("the answer so far is above")

import sys
from dataclasses import dataclass

from ringattn import config
from ringattn.generation import command
from ringattn.mesh.peers import announced_errors


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    json: bool | None = None
    """Print the answers as JSON, once they are complete. Default: False."""


def main() -> None:
    options, settings = config.parse_with(Options, sys.argv[1:], __doc__ or "", config.Generation, required=False)
    with config.reported_errors(), announced_errors():
        command.run(settings, as_json=bool(options.json))


if __name__ == "__main__":
    main()
