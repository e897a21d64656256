"""Says what a run needs and whether it fits, without allocating the model.

    python -m moe_vlm_jax.plan --config configs/sft.py[:ARGUMENT] [--config.a.b=value ...] [--target v5e:2x2 ...]

Prints parameters, bytes by kind and, compiled for the target, the step's memory, FLOPs, collectives and an estimate of
its time; and which mesh would fit. Targets (planning/targets.py): 'local', a TPU slice ('v5e', 'v5e:4x4') or a GPU
('h100:8') that need not be there, and 'gpu:GB'; --target may be repeated. --nocompile takes seconds; compiling a large
model for a TPU takes minutes. No data and no weights are read. See docs/planning.md.
"""

import json
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from moe_vlm_jax import command_line
from moe_vlm_jax.planning import plan, report, targets

_CONFIG = command_line.define_config("configs/sft.py")
_TARGETS = flags.DEFINE_multi_string("target", ["local"], "local, v5e, v5e:4x4, h100:8, gpu:24, ...; may be repeated.")
_JSON = flags.DEFINE_string("json", None, "File that also gets the plans, as a JSON list.")
_COMPILE = flags.DEFINE_bool("compile", True, "Whether to compile the step.")


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    config, names = _CONFIG.value, _TARGETS.value
    if not any(name == "local" or name.startswith("gpu") for name in names):
        jax.config.update("jax_platforms", "cpu")  # else libtpu looks for a TPU in this machine first
    plans = []
    with command_line.user_errors():
        for target in [targets.find(name, config.mesh) for name in names]:
            plans.append(plan.make_plan(config, target, compiled=_COMPILE.value))
            print(report.table(plans[-1]), end="\n\n", flush=True)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps([report.as_json(made) for made in plans], indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(main)
