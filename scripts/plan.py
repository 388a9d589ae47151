"""Plans a step: python scripts/plan.py --config configs/llama3_8b_1m.py --topology v5e:8x8 [--json FILE]

Compiles a train step, or with --decode True a step of decoding, with the TPU compiler (pip install -e '.[tpu]'),
without a TPU, and reports the memory required per device. The exit status is 1 if the step does not fit.
"""

if __name__ == "__main__":  # first, because the imports below take seconds
    from startup import signals

    signals.end_on_signals()

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from ringattn import config, planning, weights
from ringattn.runs.files import check_writable, write_json
from ringattn.runs.progress import Display

SECTIONS = ("model", "data", "mesh", "attention", "optimizer", "train", "stages")
"""Config sections that affect the compiled step."""


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    topology: str | None = None
    """Target devices: a TPU topology, such as v5e:8x8 or v5p:4x4x4, or cpu:N for N CPU devices. Required."""
    json: str | None = None
    """Also write the plan to this JSON file."""
    stage: int | None = None
    """Stage to plan, from 1. Required for a config with several stages."""
    decode: bool | None = None
    """Plan a step of decoding with a cache of data.seq_len tokens, instead of a train step. Default: False."""


def main() -> int:
    options, run = config.parse_with(Options, sys.argv[1:], __doc__ or "", sections=SECTIONS, adopt=weights.adopt)
    with config.reported_errors():
        if options.topology is None:
            raise ValueError("--topology is required, such as --topology v5e:8x8")
        if options.json is not None:
            check_writable(Path(options.json), "--json")
        if options.stage is not None and not 0 < options.stage <= len(run.stages):
            raise ValueError(f"--stage {options.stage} must be from 1 to {len(run.stages)}, the stages of {run.name}")
        compiling = Display(None, every_process=True).waiting("compiling the step")
        with config.stage_errors(run.stages, options.stage) if options.stage else nullcontext():
            c = run if options.stage is None else run.stage(options.stage)
            plan = (planning.plan_decode if options.decode else planning.plan)(c, options.topology, compiling)
        print(*planning.report(plan), sep="\n")
        if options.json is not None:
            try:
                write_json(Path(options.json), asdict(plan))
            except OSError as error:
                raise ValueError(f"cannot write --json {options.json} ({error.strerror}); use another") from None
    return int(not plan.fits)


if __name__ == "__main__":
    sys.exit(main())
