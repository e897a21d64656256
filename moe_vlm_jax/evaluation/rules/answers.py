"""Short free answers: the VQA normaliser with its soft accuracy, and ANLS."""

from collections.abc import Sequence
from typing import Literal

from moe_vlm_jax.evaluation.rules import rule as rule_lib

VqaBenchmark = Literal["textvqa", "vqav2", "vizwiz"]


def normalize_vqa(text: str, *, rule: rule_lib.Rule, benchmark: VqaBenchmark) -> str:
    """Returns the answer as the rule compares it; under llava VQAv2's and VizWiz's upload files hold it."""
    raise NotImplementedError


def vqa_accuracy(prediction: str, answers: Sequence[str], *, rule: rule_lib.Rule, benchmark: VqaBenchmark) -> float:
    """Returns one question's accuracy in [0, 1]: min(matches/3, 1) averaged over the leave-one-out answers.

    Rule llava takes exactly 10 answers (ValueError else); the others any number of them, and one answer scores 0.
    """
    raise NotImplementedError


def vqa_any(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 when the prediction equals any answer after LLaVA's normaliser (its unused ST-VQA accuracy)."""
    raise NotImplementedError


def anls(prediction: str, answers: Sequence[str], *, rule: rule_lib.Rule) -> float:
    """Returns ANLS of one question in [0, 1]; vlmevalkit = lmms_eval = `scorers.anls`, llava its own ST-VQA variant."""
    raise NotImplementedError
