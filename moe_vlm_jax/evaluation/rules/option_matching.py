"""Which option of a multiple-choice question a reply means, by rules alone: no judge is asked.

options maps the letters of a question to the texts of its options.
"""

import re
from collections.abc import Mapping, Sequence

REFUSED = "Z"  # VLMEvalKit's letter for a reply that refuses to answer; no option has it

# What the kits put in a reply's place when their model failed, and the refusals that VLMEvalKit knows.
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4  # a letter further from the end is taken for a word
_STATEMENT = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)  # no end of the word: "answer is Dutch" is D
_LMMS_LETTERS = "ABCDE"  # however many options a question has
_LMMS_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_STATIC_FORMS = ("({})", "{}.", "{}:", "{})", "{} ")  # the surest first
_STATIC_PHRASES = (
    *(f"{the}{kind}answer is" for the in ("the ", "") for kind in ("correct ", "best ", "")),
    *(f"{the}{kind}option is" for the in ("the ", "") for kind in ("correct ", "best ")),
    *(f"{the}{kind}choice is" for the in ("the ", "") for kind in ("correct ", "")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def match_vlmevalkit(prediction: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter, REFUSED for a refusal, or None.

    The one option's letter that stands as a word, if among the last four; else X of "answer is X"; else the one option
    whose text is in the reply, if the reply is at most twice as long as all options together.

    >>> options = {"A": "two", "B": "twenty"}
    >>> [match_vlmevalkit(reply, options) for reply in ("(B)", "It is not A", "answer is b, I say", "Twenty", "A, B")]
    ['B', 'A', 'B', 'B', None]
    """
    if _refuses(prediction):
        return REFUSED
    if _FAILED not in prediction:
        words = _words(prediction)
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
            return letters[0]
        if not letters and REFUSED in words:
            return REFUSED
        stated = _STATEMENT.search(prediction)
        if stated and stated[1].upper() in options:
            return stated[1].upper()
    return _match_short_text(prediction, options)


def match_vlmevalkit_verbose(prediction: str, options: Mapping[str, str]) -> str | None:
    """Returns what `match_vlmevalkit` does in a process whose environment sets VERBOSE, by a slip of that kit.

    There no letter is taken from a reply of more than three words one of which is A: "The answer is A."
    """
    words = _words(prediction)
    one_letter = sum(letter in words for letter in options) == 1
    if one_letter and "A" in words and len(words) > 3 and not _refuses(prediction):
        return _match_short_text(prediction, options)
    return match_vlmevalkit(prediction, options)


def match_lmms(prediction: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter or None: lmms-eval's older matcher, which knows the letters A to E whatever the options are.

    >>> [match_lmms(reply, {"A": "two", "B": "twenty"}) for reply in ("(E).", "[B]", "A lot of twenty here")]
    ['E', None, 'B']
    """
    letter = None if _FAILED in prediction else _lmms_letter(prediction.split())
    return letter or _match_text(prediction, options)


def extract_static(prediction: str, letters: Sequence[str]) -> str | None:
    """Returns the letter or None: the greedy reader that lmms-eval falls back on where it may not ask a judge.

    A letter at the start, at the end, behind a phrase such as "answer is", or in a form such as "(A)", in this order;
    of several the last. Where there is none, a letter within a word will do.

    >>> [extract_static(reply, "ABCD") for reply in ("The answer is (B), not C", "Cannot say", "none")]
    ['C', 'C', None]
    """
    text = prediction.strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    inner = text.strip()
    for letter in letters:
        if inner.startswith(letter) and not inner[1:2].isalpha():
            return letter
    for letter in letters:
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            return letter
    ranked = [_behind_phrases(text, letters)]
    ranked += [[(f" {text} ".rfind(form.format(letter)), letter) for letter in letters] for form in _STATIC_FORMS]
    ranked += [[(text.rfind(letter), letter) for letter in letters]]
    return next((max(found)[1] for places in ranked if (found := [place for place in places if place[0] >= 0])), None)


def _words(prediction: str) -> list[str]:
    return prediction.translate(_SIGNS).split()


def _refuses(prediction: str) -> bool:
    return _FAILED not in prediction and any(refusal in prediction for refusal in _REFUSALS)


def _match_short_text(prediction: str, options: Mapping[str, str]) -> str | None:
    if len(prediction.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    return _match_text(prediction, options)


def _match_text(prediction: str, options: Mapping[str, str]) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return found[0] if len(found) == 1 else None


def _lmms_letter(words: Sequence[str]) -> str | None:
    """Returns the letter of the first form in which exactly one letter is a word; a bare A may be an article."""
    forms = _LMMS_FORMS if "A" in words and len(words) > 3 else ("{}", *_LMMS_FORMS)
    for form in forms:
        letters = [letter for letter in _LMMS_LETTERS if form.format(letter) in words]
        if len(letters) == 1:
            return letters[0]
    return None


def _behind_phrases(text: str, letters: Sequence[str]) -> list[tuple[int, str]]:
    """Returns (place, letter) of each letter's first occurrence behind the first of each phrase; -1 for none."""
    ends = [text.lower().find(phrase) + len(phrase) for phrase in _STATIC_PHRASES if phrase in text.lower()]
    return [(text.find(letter, end), letter) for end in ends for letter in letters]
