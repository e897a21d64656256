"""Scores of one predicted answer against the accepted ones, and their means.

ANLS is the rule of InfographicVQA and DocVQA exactly as VLMEvalKit (and lmms-eval, which agrees on every known case)
computes it, oddities included: published numbers were made with them.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

ANLS_RULE = "VLMEvalKit"  # whose ANLS this is; printed beside the score
ANLS_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class Scores:
    """Means over questions; per_type is keyed by answer type and empty inside itself."""

    exact_match: float
    anls: float
    count: int
    per_type: Mapping[str, "Scores"] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        """Returns plain values for results.json."""
        flat = {"exact_match": self.exact_match, "anls": self.anls, "count": self.count}
        if self.per_type:
            flat["per_type"] = {name: scores.to_json() for name, scores in self.per_type.items()}
        return flat


def normalize(text: str) -> str:
    """Returns the text in lower case, stripped, with every run of white space as one blank.

    >>> normalize("  New\\tYork ")
    'new york'
    """
    return " ".join(text.strip().lower().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 when the prediction equals one of the answers after `normalize`, else 0.0.

    Punctuation, articles, signs and number formats count: "1,000" is not "1000", "12 %" is not "12%".

    >>> exact_match("Forty  Two", ["42", "forty two"])
    1.0
    """
    _check_answers(answers)
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Returns the average normalised Levenshtein similarity of one question, 0 below the threshold of 0.5.

    The distance is between the normalised strings, but it is divided by the longer of the RAW ones in upper case
    (Biten et al. 2019, arXiv 1905.13648, eq. 1, as VLMEvalKit wrote it); exactly 0.5 is kept, and two empty
    strings score 1.

    >>> anls("abcd", ["ab"]), anls("abx      ", ["abc"])
    (0.5, 0.8888888888888888)
    """
    score = 1.0 - min(distance_ratios(prediction, answers))
    return 0.0 if score < ANLS_THRESHOLD else score


def distance_ratios(prediction: str, answers: Sequence[str]) -> list[float]:
    """Returns the normalised distance to each answer, before the threshold."""
    _check_answers(answers)
    ratios = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = levenshtein(normalize(answer), normalize(prediction))
        ratios.append(distance / length if length else 0.0)
    return ratios


def levenshtein(a: str, b: str) -> int:
    """Returns the least number of insertions, deletions and substitutions of code points that turn a into b."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            cheapest = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], cheapest
    return row[-1]


def aggregate(rows: Iterable[Mapping]) -> Scores:
    """Returns the means over rows with keys exact_match, anls and answer_type, overall and for each answer type."""
    rows = list(rows)
    by_type = collections.defaultdict(list)
    for row in rows:
        by_type[row["answer_type"] or "untyped"].append(row)
    per_type = {name: _mean(of_type) for name, of_type in sorted(by_type.items())}
    return dataclasses.replace(_mean(rows), per_type=per_type)


def _mean(rows: Sequence[Mapping]) -> Scores:
    if not rows:
        raise ValueError("0 questions were scored, and a mean needs at least 1; check data.eval_split and its source.")
    exact, similarity = (sum(row[key] for row in rows) / len(rows) for key in ("exact_match", "anls"))
    return Scores(exact_match=exact, anls=similarity, count=len(rows))


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers={answers!r} must be a non-empty list of accepted answers; remove the question.")
