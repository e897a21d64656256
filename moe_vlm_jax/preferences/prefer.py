"""The automatic rule: the better-scored response is preferred, and of two equally good ones the shorter.

It needs accepted answers and no person. It cannot tell a good wrong answer from a bad one, so where both are wrong it
says nothing; every candidate is either in a pair or counted under the reason why not.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from moe_vlm_jax.data import pairs
from moe_vlm_jax.evaluation import scorers
from moe_vlm_jax.preferences import candidates as candidates_lib

SOURCE = "automatic"
METRICS = {"exact_match": scorers.exact_match, "anls": scorers.anls}


@dataclasses.dataclass(frozen=True)
class Preferred:
    """What the rule made of candidates.

    Attributes:
      pairs: in the candidates' order, with source 'automatic'.
      decided: pairs by what decided: 'score' or 'length'.
      undecided: candidates without a pair, by reason: 'no_answers' (none accepted are known), 'both_wrong',
        'equal' (as good, as long), 'empty_answer' (the worse one is empty, which no training takes).
    """

    pairs: list[pairs.Pair]
    decided: collections.Counter
    undecided: collections.Counter

    def report(self) -> str:
        """Returns the counts as lines for the console."""
        total = len(self.pairs) + self.undecided.total()
        lines = [f"{len(self.pairs)} pairs of {total} candidates"]
        lines += [f"  decided by {reason}: {count}" for reason, count in sorted(self.decided.items())]
        lines += [f"  undecided, {reason}: {count}" for reason, count in sorted(self.undecided.items())]
        if self.pairs:
            chosen, rejected = (
                sum(len(answer.split()) for answer in answers) / len(self.pairs)
                for answers in zip(*((pair.chosen, pair.rejected) for pair in self.pairs), strict=True)
            )
            lines.append(f"  words of an answer on average: chosen {chosen:.2f}, rejected {rejected:.2f}")
        return "\n".join(lines)


def prefer(candidates: Iterable[candidates_lib.Candidate], *, metric: str) -> Preferred:
    """Returns the pairs of the candidates that the rule can decide, and counts of all.

    The higher score comes first (exact_match: correct before wrong; anls: nearer before farther, 0 below its
    threshold), then fewer words, then fewer characters.

    Args:
      candidates: with accepted answers.
      metric: exact_match or anls.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not one of {tuple(METRICS)}; use one of them.")
    found: list[pairs.Pair] = []
    decided: collections.Counter = collections.Counter()
    undecided: collections.Counter = collections.Counter()
    for candidate in candidates:
        chosen, reason = _decide(candidate, metric)
        if chosen is None:
            undecided[reason] += 1
            continue
        found.append(candidate.pair(chosen, SOURCE))
        decided[reason] += 1
    return Preferred(found, decided, undecided)


def _decide(candidate: candidates_lib.Candidate, metric: str) -> tuple[int | None, str]:
    """Returns (0 or 1, what decided), or (None, why nothing did)."""
    if not candidate.answers:
        return None, "no_answers"
    scores = [METRICS[metric](response, candidate.answers) for response in candidate.responses]
    if not any(scores):
        return None, "both_wrong"
    ranks = [
        (-score, *_length(response)) for score, response in zip(scores, candidate.responses, strict=True)
    ]  # smaller is better
    if ranks[0] == ranks[1]:
        return None, "equal"
    if not all(response.strip() for response in candidate.responses):
        return None, "empty_answer"
    return ranks.index(min(ranks)), "score" if scores[0] != scores[1] else "length"


def _length(response: str) -> Sequence[int]:
    return len(response.split()), len(response.strip())
