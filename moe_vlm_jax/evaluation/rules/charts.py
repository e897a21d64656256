"""ChartQA's relaxed accuracy."""

from collections.abc import Sequence

from moe_vlm_jax.evaluation.rules import rule as rule_lib

TOLERANCE = 0.05  # part of the target's size that a number may be off (Masry et al. 2022, arXiv 2203.10244, 5.1)


def relaxed_accuracy(prediction: str, answers: Sequence[str], *, rule: rule_lib.Rule) -> float:
    """Returns 1.0 or 0.0; vlmevalkit strips the prediction and takes any answer, lmms_eval the first one only.

    >>> relaxed_accuracy("69 ", ["70"], rule="lmms_eval"), relaxed_accuracy("69% ", ["69%"], rule="lmms_eval")
    (1.0, 0.0)
    """
    rule_lib.require(rule, benchmark="chartqa", known=("vlmevalkit", "lmms_eval"))
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers={answers!r} must be a non-empty list of accepted answers; remove the question.")
    if rule == "lmms_eval":
        return float(is_relaxed_match(prediction, answers[0]))
    return float(any(is_relaxed_match(prediction.strip(), answer) for answer in answers))


def is_relaxed_match(prediction: str, target: str) -> bool:
    """Returns whether two numbers are within 5 percent of the target, or two texts equal in any case.

    "x%" is x/100, so "12" is not "12%". A target of zero is compared as text. Numbers are what Python's float takes:
    "1_000" and "inf", but not "1,000" or "$5". Years are numbers: 1920 is close to 2010.

    >>> is_relaxed_match("0.12", "12%"), is_relaxed_match("1920", "2010"), is_relaxed_match("0.0", "0")
    (True, True, False)
    """
    number, wanted = _number(prediction), _number(target)
    if number is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(number - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
