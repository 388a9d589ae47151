"""Plans a step: python scripts/plan.py --config configs/llama3_8b_1m.py --topology v5e:8x8 [--json FILE]

Compiles a train step, or with --decode True a step of decoding, with the TPU or GPU compiler (pip install -e '.[tpu]'),
without a device. Reports memory, transfers and time, also in runs/NAME/plan. The exit status is 1 if it does not fit.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals()

import sys
from contextlib import nullcontext

from ringattn import config, planning, weights
from ringattn.planning.command import Options, run

SECTIONS = ("name", "model", "data", "mesh", "attention", "optimizer", "train", "log", "stages")
"""Config sections that affect the compiled step, or where the report is written."""


def main() -> int:
    options, c = config.parse_with(Options, sys.argv[1:], __doc__ or "", sections=SECTIONS, adopt=weights.adopt)
    with config.reported_errors():
        if options.stage is not None and not 0 < options.stage <= len(c.stages):
            raise ValueError(f"--stage {options.stage} must be from 1 to {len(c.stages)}, the stages of {c.name}")
        with config.stage_errors(c.stages, options.stage) if options.stage else nullcontext():
            plan = run(c if options.stage is None else c.stage(options.stage), options)
        print(*planning.report(plan), sep="\n")
    return int(not plan.fits)


if __name__ == "__main__":
    sys.exit(main())
