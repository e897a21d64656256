"""Text from tokens while they are still coming: only what no later token can change is handed out.

Three things keep text back: a character of which some bytes are missing, white space that a tokenizer may tidy up once
it sees what follows, and a tail that may become a stop string. A tiny example, stop string 'END':

    tokens   'caf'  0xC3  0xA9  ' E'  'N'  'DS'
    handed   'caf'   ''    'é'  ' '    ''   ''     and then it is finished: the text is 'café '
"""

import re
from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "�"  # what decoders write for bytes that are no character, or not yet
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Tidying up removes spaces in front of punctuation and "n't", "'ve" and the like; no such pattern is longer.
_TIDIED = 6
_LONG_WINDOW, _SHORT_WINDOW = 64, 16


class TextStream:
    """The text of one answer, piece by piece.

    The pieces joined, with `flush`'s, are tokenizer.decode(all ids, skip_special_tokens=True), cut off in front of the
    stop string that is complete first (of several that end at one place, the longest). Where the text is cut depends
    on the ids alone, not on how many come at a time.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        """Starts an empty text.

        Args:
          tokenizer: a fast tokenizer of transformers.
          stop: texts that end the answer and do not belong to it; none is empty.
        """
        check_stop(stop)
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        added = tokenizer.added_tokens_decoder.items()
        self._special = set(tokenizer.all_special_ids) | {index for index, token in added if token.special}
        self._tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        # Decoding all ids each time would be quadratic. What an id becomes depends on few ids before it, so a window
        # of the last ones is decoded.
        self._window: list[int] = []
        self._taken = 0  # characters of the window's text that are certain and were taken out of it
        self._pending = ""  # taken out, but perhaps the head of a stop string
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether a stop string came; nothing is handed out any more."""
        return self._finished

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that is certain now and was not before.

        Args:
          token_ids: the next ids of the answer, any number.
        """
        if self._finished:
            return ""
        self._window += [index for index in token_ids if index not in self._special]
        text = self._decode(self._window)
        self._take(text, self._certain(text))
        self._shorten(text)
        return self._release()

    def flush(self) -> str:
        """Returns the rest of the text: no token comes any more."""
        if self._finished:
            return ""
        text = self._decode(self._window)
        self._take(text, len(text))
        rest = self._release()
        if not self._finished:
            rest, self._pending = rest + self._pending, ""
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _certain(self, text: str) -> int:
        """Returns how many characters of the window's text no later token changes."""
        end = len(text)
        run = self._byte_run()
        if run:  # one wrong byte behind it turns a whole run of bytes into replacement characters
            end = min(end, len(self._decode(self._window[:-run])))
        end = len(text[:end].rstrip(_REPLACEMENT))
        if self._tidies:
            space = text.find(" ", max(0, end - _TIDIED), end)
            end = end if space < 0 else space
        return end

    def _byte_run(self) -> int:
        """Returns how many of the last ids stand for single bytes, in the manner of sentencepiece."""
        run = 0
        for index in reversed(self._window):
            if not _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(index) or ""):
                break
            run += 1
        return run

    def _take(self, text: str, end: int) -> None:
        if end > self._taken:
            self._pending += text[self._taken : end]
            self._taken = end

    def _shorten(self, text: str) -> None:
        """Drops the first ids of a long window, where the others alone decode to the same."""
        if len(self._window) <= _LONG_WINDOW:
            return
        window = self._window[-_SHORT_WINDOW:]
        shorter, rest = self._decode(window), len(text) - self._taken
        if text.endswith(shorter) and rest <= len(shorter):
            self._window, self._taken = window, len(shorter) - rest

    def _release(self) -> str:
        """Returns the pending text in front of anything that is, or may become, a stop string."""
        start = first_stop(self._pending, self._stop)
        if start is not None:
            text, self._pending, self._finished = self._pending[:start], "", True
            return text
        held = _held(self._pending, self._stop)
        text, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return text


class AnswerStream:
    """A `TextStream` without the white space at either end, as answers are written everywhere."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        """Starts an empty answer; see `TextStream`."""
        self._stream = TextStream(tokenizer, stop)
        self._started = False
        self._space = ""  # white space that is only written when something follows

    @property
    def finished(self) -> bool:
        """Whether a stop string came."""
        return self._stream.finished

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that is certain now and was not before."""
        return self._without_ends(self._stream.push(token_ids))

    def flush(self) -> str:
        """Returns the rest of the text."""
        return self._without_ends(self._stream.flush())

    def _without_ends(self, text: str) -> str:
        text = self._space + text if self._started else text.lstrip()
        kept = text.rstrip()
        self._started = self._started or bool(kept)
        self._space = text[len(kept) :]
        return kept


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the stop string begins that is complete first, or None when the text has none.

    >>> first_stop("x = abc", ["c", "abc", "bcd"])  # both end at the same place
    4
    """
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(found)[1] if found else None


def check_stop(stop: Sequence[str]) -> None:
    """Raises ValueError for a stop string that would end every answer before it begins."""
    if not all(stop):
        raise ValueError(f"stop={tuple(stop)} has an empty text; give texts of at least one character.")


def _held(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of the text with which a stop string begins."""
    longest = max((len(word) for word in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(len(word) > length and word.startswith(text[-length:]) for word in stop):
            return length
    return 0
