"""What an update would take: python scripts/plan.py --config configs/llama3_8b_1m.py --topology v5e:8x8 [--json FILE]

Compiles the train step for TPUs that need not be there (v5e:8x8, v5p:4x4x4, ...), by their real compiler (the extra
`tpu`), or for cpu:N, and says how much memory each device would need. --json FILE writes it down, too. Any field of the
config can be overridden; --stage N is for a config of several stages. Exit status 1 if it does not fit.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ringattn import config, planning


def main() -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--topology")
    own.add_argument("--json", type=Path)
    own.add_argument("--stage", type=int)
    with config.reported_errors():
        try:
            asked, rest = own.parse_known_args()
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from None
        run = config.parse(rest, __doc__ or "")
        if asked.topology is None:
            raise ValueError("no topology given: name one, such as --topology v5e:8x8")
        if asked.json is not None and not asked.json.parent.is_dir():
            raise ValueError(f"--json {asked.json}: there is no folder {asked.json.parent}: make it first")
        if asked.stage is not None and not 0 < asked.stage <= len(run.stages):
            raise ValueError(f"--stage {asked.stage}, but the stages of {run.name} are 1 to {len(run.stages)}")
        found = planning.plan(run if asked.stage is None else run.stage(asked.stage), asked.topology)
        print(*planning.report(found), sep="\n")
        if asked.json is not None:
            asked.json.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return int(found.refusal is not None)


if __name__ == "__main__":
    sys.exit(main())
