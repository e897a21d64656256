"""How the tools take punctuation out of an answer before they compare it."""

import re

_REMOVED = ';/[]"{}()=+\\_-><@`,?!'
# The tools hand re.UNICODE (32) to `sub` where its count stands, so no more periods than that go.
_MOST_PERIODS = 32


def drop_llava(text: str) -> str:
    """Returns the text without punctuation as LLaVA and lmms-eval leave it: a period stays before a digit only.

    A sign is deleted where it stands beside a blank anywhere in the text, or where the text has a comma (or several)
    between digits; else a blank takes its place.

    >>> drop_llava("v1.0. a/b"), drop_llava("a /b"), drop_llava("1,000-2"), drop_llava("9,,9")
    ('v1.0 a b', 'a b', '10002', '99')
    """
    return _drop(text, comma=r"\d,+\d", period=r"\.(?!\d)")


def drop_vlmevalkit(text: str) -> str:
    """Returns the text without punctuation as VLMEvalKit leaves it: a period stays beside a digit on either side.

    >>> drop_vlmevalkit("v1.0. a/b"), drop_vlmevalkit("9,,9"), drop_vlmevalkit("9,9")
    ('v1.0. a b', '9  9', '99')
    """
    return _drop(text, comma=r"\d,\d", period=r"(?<!\d)\.(?!\d)")


def _drop(text: str, *, comma: str, period: str) -> str:
    between_digits = re.search(comma, text) is not None
    signs = {ord(sign): "" if between_digits or f"{sign} " in text or f" {sign}" in text else " " for sign in _REMOVED}
    return re.sub(period, "", text.translate(signs), count=_MOST_PERIODS)
