"""Puts the tiny base into the package: what configs/moe_tuning.py made, and the record of how.

    python -m moe_vlm_jax.train --config configs/moe_tuning.py       about ten minutes on two CPU cores
    python benchmarks/tiny_base.py runs/moe_tuning

Writes config.json, model.safetensors and metrics.json to moe_vlm_jax/assets/tiny_base.
"""

import importlib.metadata
import json
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = "python -m moe_vlm_jax.train --config configs/moe_tuning.py"
RUNS = ("pretrain", "stage1", "stage2", "stage3")


def main(workdir: pathlib.Path) -> None:
    """Copies the last stage's checkpoint and writes its record."""
    summaries = [json.loads((workdir / name / "summary.json").read_text()) for name in RUNS]
    configs = {name: json.loads((workdir / name / "config.json").read_text()) for name in RUNS}
    record = {
        "command": COMMAND,
        "data": "embedded synthetic infographics (mini), answer types "
        + ", ".join(configs["stage3"]["data.answer_types"]),
        "seeds": {name: config["training.seed"] for name, config in configs.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "runs": summaries,
    }
    target = ROOT / "moe_vlm_jax" / "assets" / "tiny_base"
    target.mkdir(exist_ok=True)
    for path in (workdir / "stage3" / "model").iterdir():
        shutil.copyfile(path, target / path.name)
    (target / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
