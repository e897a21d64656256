"""A trained model on benchmarks; by default on held-out questions of the embedded synthetic infographics.

    configs/evaluate.py --config.workdir=runs/sft             a run of this project
    configs/evaluate.py --config.checkpoint=FOLDER            a checkpoint in HF layout
        --config.benchmarks=infovqa,pope,mmbench              any of those in evaluation/settings.py
        --config.data_root=data/benchmarks                    the official files; --config.pope.path=... of one set

docs/evaluation.md says how the files must lie, whose rules score them, and what a judge needs.
"""

from moe_vlm_jax.evaluation import settings


def get_config() -> settings.EvaluateConfig:
    """Returns the default settings."""
    return settings.EvaluateConfig()
