"""ChartQA's relaxed accuracy."""

from collections.abc import Sequence

from moe_vlm_jax.evaluation.rules import rule as rule_lib


def relaxed_accuracy(prediction: str, answers: Sequence[str], *, rule: rule_lib.Rule) -> float:
    """Returns 1.0 or 0.0; vlmevalkit strips the prediction and takes any answer, lmms_eval the first one."""
    raise NotImplementedError


def is_relaxed_match(prediction: str, target: str) -> bool:
    """Returns whether two numbers are within 5 percent of the target, or whether two texts are equal in any case."""
    raise NotImplementedError
