"""The text asked for each benchmark under each rule, without image and conversation template."""

from collections.abc import Mapping, Sequence
from typing import Literal

from moe_vlm_jax.evaluation.rules import rule as rule_lib

ShortAnswerBenchmark = Literal["vqav2", "gqa", "pope", "mme", "docvqa", "infographicvqa", "chartqa"]


def short_answer(question: str, *, benchmark: ShortAnswerBenchmark, rule: rule_lib.Rule) -> str:
    """Returns the question and the request for a short answer."""
    raise NotImplementedError


def textvqa(question: str, *, ocr_tokens: Sequence[str] | None, rule: rule_lib.Rule) -> str:
    """Returns the question, its OCR tokens if given (LLaVA gives them, others do not by default), the request."""
    raise NotImplementedError


def textvqa_key(prompt: str) -> str:
    """Returns the lower-case question in LLaVA's TextVQA prompt; with the image's id it finds the annotation."""
    raise NotImplementedError


def vizwiz(question: str, *, rule: rule_lib.Rule) -> str:
    """Returns the question, what to say when the picture does not tell, and the request for a short answer."""
    raise NotImplementedError


def mmbench(
    question: str, *, hint: str | None, options: Mapping[str, str], language: Literal["en", "cn"], rule: rule_lib.Rule
) -> str:
    """Returns hint, question, options and the request for a letter."""
    raise NotImplementedError


def present_options(cells: Mapping[str, object], *, letters: Sequence[str]) -> dict[str, str]:
    """Returns the options of an MMBench row up to the first empty cell (None, NaN, nan or none in any case)."""
    raise NotImplementedError


def scienceqa(question: str, *, hint: str, choices: Sequence[str], rule: rule_lib.Rule) -> str:
    """Returns context, question, choices and the request for a letter."""
    raise NotImplementedError


def ai2d(question: str, *, options: Sequence[str], rule: rule_lib.Rule) -> str:
    """Returns question, options and the request for a letter."""
    raise NotImplementedError


def open_ended(question: str, *, benchmark: Literal["mmvet", "llava_bench"], rule: rule_lib.Rule) -> str:
    """Returns the question of MM-Vet or LLaVA-Bench (under lmms_eval, MM-Vet's starts with a request to reason)."""
    raise NotImplementedError
