"""Questions with every model's answer, and which of them are worth a look."""

import dataclasses
from collections.abc import Mapping, Sequence

from moe_vlm_jax.evaluation import comparison_page, units, verbosity
from moe_vlm_jax.reporting.evaluations import Answer, Evaluation, Questions


@dataclasses.dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
      questions: the set that it is of.
      answers: name of a model -> its answer, models in their order; at least one.
    """

    questions: Questions
    answers: Mapping[str, Answer]

    @property
    def first(self) -> Answer:
        """Any answer, for what all of them share: the question."""
        return next(iter(self.answers.values()))

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that the question has, each once."""
        return tuple(dict.fromkeys(tag for answer in self.answers.values() for tag in answer.tags))


# What a case can be filtered by, beside its benchmark and its tags.
KINDS = (
    "scores differ",
    "nobody is right",
    "a wrong unit",
    "a wrong value",
    "an answer repeats the question",
    "an answer is cut off",
)


def join(found: Sequence[Evaluation]) -> list[Case]:
    """Returns every question that somebody answered, benchmark by benchmark, in the order of asking.

    Answers stand in one case where id, question, accepted answers and options are the same.
    """
    cases: dict[tuple, dict[str, Answer]] = {}
    for questions in dict.fromkeys(questions for one in found for questions in one.answers):
        for one in found:
            for answer in one.answers.get(questions, ()):
                key = (questions, answer.id, answer.asked, answer.answers, tuple(answer.options.items()))
                cases.setdefault(key, {})[one.name] = answer
    return [Case(key[0], answers) for key, answers in cases.items()]


def choose(cases: Sequence[Case], number: int) -> list[Case]:
    """Returns of every benchmark at most so many cases, most interesting first, see `comparison_page.choose_cases`."""
    chosen = []
    for questions in dict.fromkeys(case.questions for case in cases):
        of_these = [case for case in cases if case.questions == questions]
        rows = [
            {name: _row(i, case, answer) for name, answer in case.answers.items()} for i, case in enumerate(of_these)
        ]
        picked = comparison_page.choose_cases(rows, number)
        chosen += [of_these[next(iter(row.values()))["index"]] for row in picked]
    return chosen


def score(answer: Answer) -> tuple[str, float | None]:
    """Returns (metric, score) by which an answer is right, partly right or wrong: the last, which is the finest."""
    return list(answer.scores.items())[-1]


def remarks(answer: Answer) -> list[str]:
    """Returns what else there is to say of an answer than its score."""
    verdict = units.check_unit(answer.prediction, answer.answers)
    said = [{"same": "same quantity", "no quantity": ""}.get(verdict, verdict)]
    said += ["repeats the question"] * verbosity.echoes(answer.prediction, answer.asked, answer.answers)
    said += ["cut off"] * answer.truncated
    return [remark for remark in said if remark]


def kinds(case: Case) -> list[str]:
    """Returns which of KINDS a case is."""
    scores = [score(answer)[1] for answer in case.answers.values()]
    said = {remark for answer in case.answers.values() for remark in remarks(answer)}
    known = [value for value in scores if value is not None]
    holds = (
        len(set(known)) > 1,
        bool(known) and max(known) < 1,
        "wrong unit" in said,
        "wrong value" in said,
        "repeats the question" in said,
        "cut off" in said,
    )
    return [kind for kind, yes in zip(KINDS, holds, strict=True) if yes]


def _row(index: int, case: Case, answer: Answer) -> dict:
    """Returns an answer as `comparison_page.choose_cases` weighs it; its first tag takes the place of the type."""
    value = score(answer)[1] or 0.0
    return {
        "index": index,
        "prediction": answer.prediction,
        "exact_match": float(value == 1),
        "anls": value,
        "answer_type": next(iter(case.tags), ""),
    }
