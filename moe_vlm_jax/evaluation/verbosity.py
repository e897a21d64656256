"""How wordy answers are: words per answer, and how often an answer repeats its question.

Preference training is meant to make answers shorter without making them worse, so these stand beside the scores.
"""

from collections.abc import Iterable, Mapping, Sequence

from moe_vlm_jax.evaluation import scorers

ECHO_WORDS = 3  # consecutive words of the question that make an answer an echo of it


def num_words(answer: str) -> int:
    """Returns the number of words of an answer: what white space separates.

    >>> num_words(" The LED supports 20 mA. "), num_words("20mA"), num_words("")
    (5, 1, 0)
    """
    return len(answer.split())


def echoes(answer: str, question: str, accepted: Sequence[str]) -> bool:
    """Whether an answer repeats its question.

    It does when it holds three consecutive words of the question, or, of a question of fewer words, all of them, and
    no accepted answer holds these words. Words are compared after `scorers.normalize` and without punctuation at their
    ends. One or two words that a longer question has too are no echo, nor is an option of the question that is right:

    >>> question = "What is the maximum forward current of the LED?"
    >>> echoes("The LED can support a maximum forward current of 20 mA.", question, ["20 mA"])
    True
    >>> echoes("20 mA forward current", question, ["20 mA"])
    False
    >>> echoes("New York City", "Which is larger, New York City or Boston?", ["New York City"])
    False

    What text alone cannot tell apart counts: an option of three words that is the wrong one, as a whole answer.

    Args:
      answer: of the model.
      question: that it answers, without instructions around it.
      accepted: accepted answers; a question-span answer of several words is no echo.
    """
    asked = _words(question)
    length = min(ECHO_WORDS, len(asked))
    if not length:  # a question without a word cannot be repeated
        return False
    repeated = _runs(asked, length) & _runs(_words(answer), length)
    return not repeated <= set().union(*(_runs(_words(text), length) for text in accepted))


def mean_words(rows: Iterable[Mapping]) -> float:
    """Returns the mean number of words per answer.

    Args:
      rows: at least one prediction, with key prediction.
    """
    counts = [num_words(row["prediction"]) for row in rows]
    return sum(counts) / len(counts)


def echo_rate(rows: Iterable[Mapping]) -> float:
    """Returns the part of the answers that repeat their question.

    Args:
      rows: at least one prediction, with keys question, answers and prediction.
    """
    found = [echoes(row["prediction"], row["question"], row["answers"]) for row in rows]
    return sum(found) / len(found)


def _words(text: str) -> list[str]:
    stripped = (_strip(word) for word in scorers.normalize(text).split())
    return [word for word in stripped if word]


def _strip(word: str) -> str:
    """Removes what is neither letter nor digit from both ends."""
    ends = [i for i, character in enumerate(word) if character.isalnum()]
    return word[ends[0] : ends[-1] + 1] if ends else ""


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """Returns all runs of so many consecutive words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
