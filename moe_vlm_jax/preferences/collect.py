"""From candidates and the marks of one or more annotators to pairs, by majority."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

from moe_vlm_jax.data import pairs
from moe_vlm_jax.preferences import agreement, candidates, marks


@dataclasses.dataclass(frozen=True)
class Collected:
    """What marks made of candidates.

    Attributes:
      pairs: in the candidates' order; the source names who chose the preferred response, e.g. 'ana,ben'.
      without: candidates without a pair, by reason: 'unmarked', 'skipped' (by all who saw them), 'tie' (by majority),
        'disagreement' (no majority), 'empty_answer' (one response is empty, which no training takes).
      strangers: marks that hold, of items that the candidates do not have.
      agreement: between annotators who marked the same candidates; None where none did.
    """

    pairs: list[pairs.Pair]
    without: collections.Counter
    strangers: int
    agreement: agreement.Agreement | None

    def report(self) -> str:
        """Returns the counts as lines for the console."""
        lines = [f"{len(self.pairs)} pairs of {len(self.pairs) + self.without.total()} candidates"]
        lines += [f"  no pair, {reason}: {count}" for reason, count in sorted(self.without.items())]
        if self.strangers:
            lines.append(f"  marks of items that the candidates do not have: {self.strangers}")
        return "\n".join([*lines, *([] if self.agreement is None else [self.agreement.report()])])


def collect(found: Sequence[candidates.Candidate], held: Mapping[str, Mapping[str, marks.Mark]]) -> Collected:
    """Returns a pair for each candidate for which more than half of those who judged it chose the same response.

    Args:
      found: candidates.
      held: annotator -> candidate id -> mark, as `read_all` gives it.

    Raises:
      ValueError: marks were made on other responses than the candidates have.
    """
    marks.check_digests(held, found)
    known = {candidate.id for candidate in found}
    strangers = sum(name not in known for items in held.values() for name in items)
    held = {name: {i: mark for i, mark in items.items() if i in known} for name, items in held.items()}
    kept: list[pairs.Pair] = []
    without: collections.Counter = collections.Counter()
    for candidate in found:
        given = {name: items[candidate.id].mark for name, items in held.items() if candidate.id in items}
        votes = {name: mark for name, mark in given.items() if mark != "skip"}
        if not votes:
            without["skipped" if given else "unmarked"] += 1
            continue
        choice, count = collections.Counter(votes.values()).most_common(1)[0]
        if 2 * count <= len(votes):
            without["disagreement"] += 1
        elif choice == "tie":
            without["tie"] += 1
        elif not all(response.strip() for response in candidate.responses):
            without["empty_answer"] += 1
        else:
            source = ",".join(sorted(name for name, mark in votes.items() if mark == choice))
            kept.append(candidate.pair(candidates.NAMES.index(choice), source))
    return Collected(kept, without, strangers, agreement.agreement(judgements(held)))


def read_all(paths: Iterable[str | os.PathLike]) -> dict[str, dict[str, marks.Mark]]:
    """Returns annotator -> candidate id -> the mark that holds, from one or more files of marks.

    Raises:
      ValueError: a file is missing or broken, or an annotator marked one item in two files.
    """
    held: dict[str, dict[str, marks.Mark]] = {}
    for path in paths:
        ledger = marks.read_marks(path)
        for annotator in ledger.annotators():
            mine = held.setdefault(annotator, {})
            if twice := sorted(mine.keys() & ledger.held(annotator).keys()):
                raise ValueError(
                    f"{annotator!r} marked {twice[0]!r} in two of the files; one mark counts; give one of the files."
                )
            mine.update(ledger.held(annotator))
    return held


def judgements(held: Mapping[str, Mapping[str, marks.Mark]]) -> list[dict[str, str]]:
    """Returns, for each item, what each annotator judged it; a skip is no judgement.

    Raises:
      ValueError: two annotators saw other responses under one id.
    """
    items: dict[str, dict[str, str]] = {}
    digests: dict[str, str] = {}
    for annotator, of in held.items():
        for name, mark in of.items():
            if digests.setdefault(name, mark.digest) != mark.digest:
                raise ValueError(
                    f"item {name!r} had other responses for {annotator!r} than for others; marks of one file of "
                    "candidates can be compared; give those."
                )
            if mark.mark != "skip":
                items.setdefault(name, {})[annotator] = mark.mark
    return list(items.values())
