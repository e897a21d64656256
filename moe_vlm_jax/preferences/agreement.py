"""How far annotators agree beyond chance, from the marks they made of the same items.

A judgement is a category ('first', 'second', 'tie'); who did not judge an item is absent from it.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

Judgements = Sequence[Mapping[str, str]]  # for each item: annotator -> category


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of any number of annotators.

    Attributes:
      items: how many were judged by two or more.
      raw: share of the pairs of judgements of one item that are equal.
      kappa: Cohen's, for each two annotators with common items: (number of these, their raw agreement, kappa).
      alpha: Krippendorff's, nominal; None where every judgement is the same, so chance explains all.
    """

    items: int
    raw: float
    kappa: Mapping[tuple[str, str], tuple[int, float, float | None]]
    alpha: float | None

    def report(self) -> str:
        """Returns the figures as lines for people."""
        lines = [f"{self.items} items marked by two or more: raw agreement {self.raw:.3f}"]
        for (first, second), (items, raw, kappa) in self.kappa.items():
            lines.append(f"  {first} and {second}: {items} items, raw {raw:.3f}, Cohen's kappa {_figure(kappa)}")
        return "\n".join([*lines, f"  all: Krippendorff's alpha (nominal) {_figure(self.alpha)}"])


def agreement(judgements: Judgements) -> Agreement | None:
    """Returns the agreement, or None where no item was judged by two annotators."""
    shared = [item for item in judgements if len(item) > 1]
    if not shared:
        return None
    equal = [a == b for item in shared for a, b in itertools.combinations(item.values(), 2)]
    kappa = {}
    for pair in itertools.combinations(sorted({name for item in shared for name in item}), 2):
        both = [(item[pair[0]], item[pair[1]]) for item in shared if pair[0] in item and pair[1] in item]
        if both:
            kappa[pair] = (len(both), sum(a == b for a, b in both) / len(both), cohens_kappa(both))
    return Agreement(len(shared), sum(equal) / len(equal), kappa, krippendorffs_alpha(judgements))


def cohens_kappa(judged: Sequence[tuple[str, str]]) -> float | None:
    """Returns (observed - expected) / (1 - expected) agreement of two annotators (Cohen 1960).

    Args:
      judged: for each item, the category that either gave it; at least one item.

    Returns:
      kappa; None where both gave all items the same one category, so that agreement by chance is 1.
    """
    count = len(judged)
    observed = sum(a == b for a, b in judged) / count
    first, second = (collections.Counter(side) for side in zip(*judged, strict=True))
    expected = sum(first[category] * second[category] for category in first) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorffs_alpha(judgements: Judgements) -> float | None:
    """Returns 1 - observed / expected disagreement, for nominal categories and missing judgements.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C. Items with one judgement do not count.

    Returns:
      alpha; None where all judgements are of one category, or no item has two.
    """
    units = [collections.Counter(item.values()) for item in judgements if len(item) > 1]
    totals = sum(units, collections.Counter())  # n_c
    pairable = totals.total()  # n
    expected = pairable**2 - sum(n * n for n in totals.values())  # times n (n - 1): pairs of unequal ones
    if not expected:
        return None
    # A unit of m judgements has m (m - 1) ordered pairs and weighs m in all.
    observed = sum((unit.total() ** 2 - sum(n * n for n in unit.values())) / (unit.total() - 1) for unit in units)
    return 1 - (pairable - 1) * observed / expected


def _figure(value: float | None) -> str:
    return "undefined (only one category was used)" if value is None else f"{value:.3f}"
