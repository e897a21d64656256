"""Runs side by side as one HTML page: the table of comparison.py, then cases with every run's answer.

The page is of markup.py's kind: no network, no other file, no script. The filter by answer type is CSS.
"""

import collections
import html
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import comparison, markup, outputs, scorers, units, verbosity

Case = Mapping[str, Mapping]  # name of a run -> its prediction, for one question


def write_comparison(
    path: str | os.PathLike,
    *,
    title: str,
    note: str,
    runs: Mapping[str, comparison.Predictions],
    records: Sequence[records_lib.Record],
    num_samples: int,
    load_image: Callable[[Any], Image.Image],
) -> None:
    """Writes the page; whole or absent, never half written.

    Args:
      path: the HTML file.
      title: heading.
      note: one sentence below it.
      runs: name -> predictions, the first one the one to compare with.
      records: among them those that were asked.
      num_samples: how many questions to show at most, see `choose_cases`.
      load_image: image reference -> PIL image.

    Raises:
      ValueError: the runs cannot be compared (`comparison.check_same_questions`), or a record is missing.
    """
    comparison.check_same_questions(runs)
    by_id = {record.id: record for record in records}
    asked = [row["id"] for row in next(iter(runs.values()))]
    if missing := [question for question in asked if question not in by_id]:
        raise ValueError(
            f"{len(missing)} of {len(asked)} questions are not among the {len(by_id)} records (e.g. {missing[0]!r}); "
            "give the records of the split that was asked."
        )
    found = {name: {row["id"]: row for row in rows} for name, rows in runs.items()}
    shown = choose_cases([{name: rows[question] for name, rows in found.items()} for question in asked], num_samples)
    kinds = collections.Counter(sorted(_kind(case) for case in shown))
    body = (
        f'<div class="tables">{_table(runs)}</div>\n<h2>Cases ({len(shown)} of {len(asked)} questions)</h2>\n'
        f'{_filter(kinds)}<div class="cards">{_cards(shown, by_id, list(kinds), load_image)}</div>'
    )
    text = markup.document(title=title, note=note, style=_STYLE + _hiding(len(kinds)), body=body)
    outputs.write_atomically(path, text)


def choose_cases(cases: Sequence[Case], num_samples: int) -> list[Case]:
    """Returns the most interesting questions, most interesting first.

    First those to which the runs have most different answers (after `scorers.normalize`), of these those whose scores
    are farthest apart. Every answer type gets as many as the others, as far as it has them.

    Args:
      cases: all questions.
      num_samples: how many to return at most.
    """
    ordered = sorted(cases, key=_interest)  # stable: of equals, the first asked comes first
    of_kind: collections.Counter[str] = collections.Counter()
    turns = []  # how many of its type are more interesting
    for case in ordered:
        turns.append(of_kind[_kind(case)])
        of_kind[_kind(case)] += 1
    chosen = sorted(range(len(ordered)), key=lambda i: (turns[i], i))[:num_samples]
    return [ordered[i] for i in sorted(chosen)]


def _interest(case: Case) -> tuple[float, float]:
    scores = [row["exact_match"] + row["anls"] for row in case.values()]
    different = len({scorers.normalize(row["prediction"]) for row in case.values()})
    return -different, min(scores) - max(scores)


def _kind(case: Case) -> str:
    return comparison.answer_type(next(iter(case.values())))


def _table(runs: Mapping[str, comparison.Predictions]) -> str:
    heads = [f'<th scope="col">{html.escape(head)}</th>' for head in ("run", "questions", *comparison.COLUMNS)]
    bodies = []
    for kind, rows in comparison.table(runs):
        lines = [f'<tr><th scope="rowgroup" colspan="{len(heads)}">{html.escape(kind)}</th></tr>']
        for row in rows:
            cells = "".join(f"<td>{value}{change and f' <small>{change}</small>'}</td>" for value, change in row.cells)
            lines.append(f'<tr><th scope="row">{html.escape(row.run)}</th><td>{row.count}</td>{cells}</tr>')
        bodies.append("".join(lines))
    caption = f"Held-out questions; in small type the difference to {next(iter(runs))}"
    return markup.table(caption=caption, heads=heads, bodies=bodies)


def _filter(kinds: Mapping[str, int]) -> str:
    """Returns a radio button for all cases and for each type with so many; `_hiding` has what they do."""
    if len(kinds) < 2:
        return ""
    return "".join(
        f'<input type="radio" name="kind" id="show-{i}"{"" if i else " checked"}>'
        f'<label for="show-{i}">{html.escape(kind)} ({count})</label>\n'
        for i, (kind, count) in enumerate([("all", sum(kinds.values())), *kinds.items()])
    )


def _hiding(num_kinds: int) -> str:
    """Returns the rules by which a button hides the cases of other types, and images without a case of its own."""
    return "".join(
        f"#show-{i}:checked ~ .cards :is(article, li):not(.kind-{i}) {{ display: none; }}\n"
        for i in range(1, num_kinds + 1)
    )


def _cards(
    cases: Sequence[Case],
    records: Mapping[str, records_lib.Record],
    kinds: Sequence[str],
    load_image: Callable[[Any], Image.Image],
) -> str:
    """Returns the cases; those about one image stand together, where the most interesting of them is."""
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        record = records[next(iter(case.values()))["id"]]
        groups.setdefault(record.images or record.id, []).append(case)
    cards = []
    for group in groups.values():
        classes = [f"kind-{kinds.index(_kind(case)) + 1}" for case in group]
        questions = [_question(case, name) for case, name in zip(group, classes, strict=True)]
        images = records[next(iter(group[0].values()))["id"]].images
        cards.append(markup.card(images, questions, load_image, classes=dict.fromkeys(classes)))
    return "".join(cards)


def _question(case: Case, kind_class: str) -> str:
    row = next(iter(case.values()))
    lines = [("gold", markup.accepted(row["answers"]))]
    lines += [(name, markup.verdict(answer, _remarks(answer))) for name, answer in case.items()]
    return markup.question(row["question"], row["answer_type"], lines, classes=[kind_class])


def _remarks(row: Mapping) -> list[str]:
    """Returns what else there is to say of an answer than its score."""
    remarks = [_UNIT_REMARKS[units.check_unit(row["prediction"], row["answers"])]]
    if verbosity.echoes(row["prediction"], row["question"], row["answers"]):
        remarks.append("repeats the question")
    if row["truncated"]:
        remarks.append("cut off")
    return [remark for remark in remarks if remark]


_UNIT_REMARKS = {"same": "same quantity", "wrong unit": "wrong unit", "wrong value": "wrong value", "no quantity": ""}

_STYLE = """\
th[scope=rowgroup] { text-align: left; font-weight: 600; padding-top: .7rem; }
tbody th[scope=row] { padding-left: 1.3rem; white-space: nowrap; }
td { white-space: nowrap; }
small { color: var(--soft); }
input[type=radio] { margin: 0 .3rem 0 0; }
label { margin-right: 1.1rem; }
.cards { margin-top: 1rem; }
"""
