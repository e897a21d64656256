"""The text asked for each benchmark under each rule, without image and conversation template.

The tools' requests are part of what they measure, so they stand here letter by letter.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Literal

from moe_vlm_jax.evaluation.rules import rule as rule_lib

ShortAnswerBenchmark = Literal["vqav2", "gqa", "pope", "mme", "docvqa", "infographicvqa", "chartqa"]

_SHORTLY = "\nAnswer the question using a single word or phrase."
_ONE_WORD = "\nAnswer the question with a single word."
_YES_OR_NO = " Please answer yes or no."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_LETTER_CHINESE = "\n请直接回答选项字母。"
_REASON = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)

_ALL_THREE: tuple[rule_lib.Rule, ...] = ("llava", "vlmevalkit", "lmms_eval")
_KITS: tuple[rule_lib.Rule, ...] = ("vlmevalkit", "lmms_eval")
_SHORT_ANSWER_RULES: dict[str, tuple[rule_lib.Rule, ...]] = {
    "vqav2": _ALL_THREE,
    "gqa": _ALL_THREE,
    "pope": _ALL_THREE,
    "mme": ("official", *_KITS),
    "docvqa": _KITS,
    "infographicvqa": _KITS,
    "chartqa": _KITS,
}


def short_answer(question: str, *, benchmark: ShortAnswerBenchmark, rule: rule_lib.Rule) -> str:
    """Returns the question and the request for a short answer.

    VLMEvalKit adds nothing to POPE's and MME's questions. Under official, MME's is LLaVA's prompt: that tool only
    scores. LLaVA and lmms-eval take " Please answer yes or no." out of it.

    >>> short_answer("Is it red? Please answer yes or no.", benchmark="mme", rule="official")
    'Is it red?\\nAnswer the question using a single word or phrase.'
    """
    rule_lib.require(rule, benchmark=benchmark, known=_SHORT_ANSWER_RULES[benchmark])
    if benchmark in ("pope", "mme"):
        if rule == "vlmevalkit":
            return question
        question = question.strip()
    if benchmark == "mme":
        question = question.replace(_YES_OR_NO, "")
    return question + (_ONE_WORD if (benchmark, rule) == ("chartqa", "lmms_eval") else _SHORTLY)


def textvqa(question: str, *, ocr_tokens: Sequence[str] | None, rule: rule_lib.Rule) -> str:
    """Returns the question, its OCR tokens if given, and the request for a short answer.

    LLaVA gives the tokens and its published numbers have them; lmms-eval does not unless told to, VLMEvalKit never.

    >>> textvqa("what is it?", ocr_tokens=["a", "b"], rule="llava")
    'what is it?\\nReference OCR token: a, b\\nAnswer the question using a single word or phrase.'
    """
    rule_lib.require(rule, benchmark="textvqa", known=_ALL_THREE)
    if rule == "vlmevalkit" and ocr_tokens is not None:
        raise ValueError(f"{len(ocr_tokens)} ocr_tokens: rule vlmevalkit has no prompt with them; pass None.")
    tokens = "" if ocr_tokens is None else f"\nReference OCR token: {', '.join(ocr_tokens)}"
    return (question.capitalize() if rule == "lmms_eval" else question) + tokens + _SHORTLY


def textvqa_key(prompt: str) -> str:
    """Returns the lower-case question in LLaVA's TextVQA prompt; with the image's id it finds the annotation.

    >>> textvqa_key("What is it?\\nReference OCR token: a, b\\nAnswer the question using a single word or phrase.")
    'what is it?'
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        asked = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        question = asked and asked[1]
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        question = lines[1] if prompt.startswith("Reference OCR token:") else lines[0]
    else:
        question = lines[0] if len(lines) == 2 else None
    if question is None:
        raise ValueError(f"prompt={prompt!r} is none of LLaVA's TextVQA prompts; make them with `textvqa`.")
    return question.lower()


def vizwiz(question: str, *, rule: rule_lib.Rule) -> str:
    """Returns the question, what to say when the picture does not tell (not under vlmevalkit), and the request."""
    rule_lib.require(rule, benchmark="vizwiz", known=_ALL_THREE)
    if rule == "vlmevalkit":
        return question + _SHORTLY
    return (question.capitalize() if rule == "lmms_eval" else question) + _UNANSWERABLE + _SHORTLY


def mmbench(
    question: str, *, hint: object, options: Mapping[str, str], language: Literal["en", "cn"], rule: rule_lib.Rule
) -> str:
    """Returns hint, question, options and the request for a letter.

    Args:
      question: of the row.
      hint: of the row, as it was read: a text, None or NaN.
      options: letter -> text, as `present_options` gives them.
      language: of the request; VLMEvalKit's is English in any case.
      rule: llava, vlmevalkit (its own prompt; for LLaVA models that kit uses LLaVA's) or lmms_eval (English only).
    """
    rule_lib.require(rule, benchmark="mmbench", known=_ALL_THREE if language == "en" else ("llava", "vlmevalkit"))
    if rule == "vlmevalkit":
        return _kit_choices(question, hint=None if _is_missing(hint) else str(hint), options=options)
    listed = _listed(options)
    if rule == "llava":
        front = "" if is_empty(hint) else f"{hint}\n"
        return f"{front}{question}{listed}" + (_LETTER if language == "en" else _LETTER_CHINESE)
    front = "" if _is_missing(hint) or hint == "nan" else f"{hint} "
    return f"{front}{question} There are several options:{listed}".rstrip("\n") + "\n" + _LETTER


def present_options(cells: Mapping[str, object], *, rule: rule_lib.Rule) -> dict[str, str]:
    """Returns letter -> text of the options that a row of MMBench has, cells being its columns A, B, C, ...

    LLaVA knows A to D and stops at the first that `is_empty`, so that an option "None" and all behind it are lost. The
    kits leave out missing cells; lmms_eval knows A to E and leaves out "nan", too.

    >>> present_options({"A": "1", "B": "None", "C": "3"}, rule="llava")
    {'A': '1'}
    """
    rule_lib.require(rule, benchmark="mmbench", known=_ALL_THREE)
    if rule == "vlmevalkit":
        letters = [letter for letter in string.ascii_uppercase if letter in cells]
        return {letter: str(cells[letter]) for letter in letters if not _is_missing(cells[letter])}
    if rule == "lmms_eval":
        letters = [letter for letter in "ABCDE" if letter in cells and cells[letter] not in ("", "nan")]
        return {letter: str(cells[letter]) for letter in letters if not _is_missing(cells[letter])}
    options = {}
    for letter in "ABCD":
        if is_empty(cells.get(letter)):
            break
        options[letter] = str(cells[letter])
    return options


def is_empty(cell: object) -> bool:
    """Returns whether LLaVA takes a cell of MMBench for empty: None, NaN, or "nan" or "none" in any case."""
    return _is_missing(cell) or (isinstance(cell, str) and cell.lower() in ("nan", "none"))


def scienceqa(question: str, *, hint: str, choices: Sequence[str], rule: rule_lib.Rule) -> str:
    """Returns context, question, choices and the request for a letter; for LLaVA see `scienceqa_stored`."""
    rule_lib.require(rule, benchmark="scienceqa's own prompt (LLaVA's is `scienceqa_stored`)", known=("lmms_eval",))
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}{_listed(_lettered(choices))}{_LETTER}"


def scienceqa_stored(text: str) -> str:
    """Returns LLaVA's ScienceQA prompt: the first turn of its question file without <image>, and the request.

    >>> scienceqa_stored("<image>\\nWhich?\\nA. a\\nB. b")
    "Which?\\nA. a\\nB. b\\nAnswer with the option's letter from the given choices directly."
    """
    return text.replace("<image>", "").strip() + _LETTER


def ai2d(question: str, *, options: Sequence[str], rule: rule_lib.Rule) -> str:
    """Returns question, options and the request for a letter."""
    rule_lib.require(rule, benchmark="ai2d", known=_KITS)
    if rule == "vlmevalkit":
        return _kit_choices(question, hint=None, options=_lettered(options))
    return f"{question}{_listed(_lettered(options))}{_LETTER}"


def open_ended(question: str, *, benchmark: Literal["mmvet", "llava_bench"], rule: rule_lib.Rule) -> str:
    """Returns the question of MM-Vet or LLaVA-Bench; under lmms_eval MM-Vet's starts with a request to reason."""
    rule_lib.require(rule, benchmark=benchmark, known=_ALL_THREE)
    return _REASON + question if (benchmark, rule) == ("mmvet", "lmms_eval") else question


def _is_missing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)  # NaN alone differs from itself


def _lettered(options: Sequence[str]) -> dict[str, str]:
    return {chr(ord("A") + index): text for index, text in enumerate(options)}


def _listed(options: Mapping[str, str]) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in options.items())


def _kit_choices(question: str, *, hint: str | None, options: Mapping[str, str]) -> str:
    front = "" if hint is None else f"Hint: {hint}\n"
    listed = (
        f"Options:{_listed(options)}\nPlease select the correct answer from the options above. \n" if options else ""
    )
    return f"{front}Question: {question}\n{listed}"
