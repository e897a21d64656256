"""A report as one HTML page: the tables, then cases with every model's answer and filters.

The page is of evaluation/markup.py's kind. Its one script, filter.js, hides cases; without it all of them show.
"""

import collections
import html
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from PIL import Image

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import markup
from moe_vlm_jax.reporting import cases as cases_lib
from moe_vlm_jax.reporting import evaluations
from moe_vlm_jax.reporting.cases import Case
from moe_vlm_jax.reporting.evaluations import Answer, Evaluation
from moe_vlm_jax.reporting.layout import Cell, Head, Section, Table

IMAGE_SIDE = 320  # pixels of a thumbnail
_UNREADABLE = (OSError, ValueError, bad_samples.SampleError, Image.DecompressionBombError)


def document(
    *,
    title: str,
    note: str,
    tables: Sequence[Table],
    folded: Sequence[Table],
    found: Sequence[Evaluation],
    num_cases: int,
    max_images: int,
) -> str:
    """Returns the page.

    Args:
      title: heading, a text.
      note: below it, a text.
      tables: shown.
      folded: shown when a reader opens them.
      found: the models, whose answers make the cases.
      num_cases: most cases of a benchmark.
      max_images: most different pictures on the page.
    """
    joined = cases_lib.join(found)
    chosen = cases_lib.choose(joined, num_cases)
    shown = "".join(f"<section>{render(table)}</section>" for table in tables)
    details = "".join(
        f"<details><summary>{html.escape(table.caption)}</summary>{render(table, caption=False)}</details>"
        for table in folded
    )
    body = f"{shown}\n{details and f'<h2>More tables</h2>{details}'}\n"
    if chosen:
        body += _viewer(chosen, len(joined), {one.name: one for one in found}, max_images)
    script = importlib.resources.files("moe_vlm_jax.reporting").joinpath("filter.js").read_text(encoding="utf-8")
    return markup.document(title=title, note=note, style=_STYLE, body=body, script=script if chosen else "")


def render(table: Table, *, caption: bool = True) -> str:
    """Returns a table and its notes as HTML."""
    heads = [f'<th scope="col"{_align(i, table)}>{_head(head)}</th>' for i, head in enumerate(table.heads)]
    bodies = [_section(section, table) for section in table.sections]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return markup.table(caption=table.caption if caption else "", heads=heads, bodies=bodies) + (
        f'<ul class="notes">{notes}</ul>' if notes else ""
    )


def _section(section: Section, table: Table) -> str:
    kind = ' class="published"' if section.published else ""
    lines = []
    if section.heading:
        lines.append(f'<tr><th scope="rowgroup" colspan="{len(table.heads)}">{html.escape(section.heading)}</th></tr>')
    for row in section.rows:
        cells = "".join(f"<td{_align(i, table)}>{_cell(cell)}</td>" for i, cell in enumerate(row.cells, start=1))
        lines.append(f'<tr{kind}><th scope="row">{html.escape(row.name)}</th>{cells}</tr>')
    return "".join(lines)


def _align(index: int, table: Table) -> str:
    return ' class="text"' if index - 1 in table.texts else ""


def _head(head: Head) -> str:
    return html.escape(head.text) + "".join(f"<small>{html.escape(line)}</small>" for line in head.small)


def _cell(cell: Cell) -> str:
    return html.escape(cell.text) + (f" <small>{html.escape(cell.small)}</small>" if cell.small else "")


def _viewer(chosen: Sequence[Case], total: int, models: Mapping[str, Evaluation], max_images: int) -> str:
    """Returns the cases with their filters."""
    titles = evaluations.titles(list(models.values()))
    benchmarks = {questions: str(i) for i, questions in enumerate(dict.fromkeys(case.questions for case in chosen))}
    names = {questions: f"{titles[questions.benchmark]} {questions.split}".strip() for questions in benchmarks}
    counted = collections.Counter(tag for case in chosen for tag in case.tags)
    tags = {tag: str(i) for i, tag in enumerate(sorted(counted))}
    kinds = {kind: str(i) for i, kind in enumerate(cases_lib.KINDS)}
    of_kind = collections.Counter(kind for case in chosen for kind in cases_lib.kinds(case))
    of_benchmark = collections.Counter(case.questions for case in chosen)
    filters = [
        _select("benchmark", [(names[q], of_benchmark[q], i) for q, i in benchmarks.items()]),
        _select("tag", [(tag, counted[tag], i) for tag, i in tags.items()]),
        _select("kind", [(kind, of_kind[kind], i) for kind, i in kinds.items() if of_kind[kind]]),
    ]
    pictures = _Pictures(max_images)
    groups: dict[Any, list[Case]] = {}
    for case in chosen:  # questions about one picture stand together, where the most interesting of them is
        images = pictures.references(case, models)
        groups.setdefault((case.questions, images or case.first.id), []).append(case)
    cards = []
    for group in groups.values():
        questions = (
            _question(
                case,
                names[case.questions],
                {
                    "benchmark": benchmarks[case.questions],
                    "tag": " ".join(tags[tag] for tag in case.tags),
                    "kind": " ".join(kinds[kind] for kind in cases_lib.kinds(case)),
                },
            )
            for case in group
        )
        cards.append(markup.card_of(pictures.of(group[0], models), questions))
    heading = f"<h2>Cases ({len(chosen)} of {total} questions)</h2>"
    note = f'<p class="note">{html.escape(pictures.note())}</p>' if pictures.note() else ""
    search = '<label>text <input type="search"></label>'
    controls = f'<form id="filters" hidden>{"".join(filters)}{search} <output id="shown"></output></form>'
    return f'{heading}{note}{controls}<div class="cards" id="cases">{"".join(cards)}</div>'


def _select(name: str, options: Iterable[tuple[str, int, str]]) -> str:
    """Returns a list to choose from: (text, how many cases, value)."""
    lines = "".join(f'<option value="{i}">{html.escape(text)} ({count})</option>' for text, count, i in options)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{lines}</select></label>' if lines else ""


def _question(case: Case, benchmark: str, data: Mapping[str, str]) -> str:
    first = case.first
    lines = []
    if first.options:
        options = "<br>".join(html.escape(f"{letter}. {text}") for letter, text in first.options.items())
        lines.append(("options", f"<dd>{options}</dd>"))
    if first.answers:
        lines.append(("gold", markup.accepted(first.answers)))
    lines += [(name, _marked(answer)) for name, answer in case.answers.items()]
    where = " · ".join([benchmark, first.id, *case.tags])
    return markup.question(first.asked, where, lines, data=data)


def _marked(answer: Answer) -> str:
    """Returns an answer with a sign and words for its score: colour is never the only mark."""
    metric, score = cases_lib.score(answer)
    remarks = cases_lib.remarks(answer)
    if score is None:
        return markup.marked(answer.prediction, "? not scored", "", remarks)
    if score == 1:
        return markup.marked(answer.prediction, "✓ right", "right", remarks)
    if score == 0:
        return markup.marked(answer.prediction, "✗ wrong", "wrong", remarks)
    return markup.marked(answer.prediction, f"◐ in part ({metric} {score:.2f})", "part", remarks)


class _Pictures:
    """Thumbnails of a page; what is not embedded is counted."""

    def __init__(self, limit: int):
        self._limit = limit
        self._urls: dict[Any, str] = {}
        self._beyond: set[Any] = set()
        self._unreadable: dict[Any, str] = {}

    def references(self, case: Case, models: Mapping[str, Evaluation]) -> tuple[Any, ...]:
        """Returns the references of a case's images, from the first model that has any."""
        for name, answer in case.answers.items():
            try:
                if images := models[name].find_images(answer):
                    return images
            except _UNREADABLE as error:
                self._missing(f"the images of {name}", error)
        return ()

    def of(self, case: Case, models: Mapping[str, Evaluation]) -> list[str]:
        """Returns the pictures of a case as HTML."""
        return [self._picture(image, case, models) for image in self.references(case, models)]

    def note(self) -> str:
        """Returns what is not embedded, '' for nothing."""
        said = []
        if self._beyond:
            said.append(f"{len(self._beyond)} pictures are not embedded: there are more than max_images={self._limit}.")
        if self._unreadable:
            where, why = next(iter(self._unreadable.items()))
            said.append(f"{len(self._unreadable)} cannot be read, the first is {where}: {why}")
        return " ".join(said)

    def _picture(self, image: Any, case: Case, models: Mapping[str, Evaluation]) -> str:
        if image not in self._urls:
            if len(self._urls) >= self._limit:
                self._beyond.add(image)
                return '<p class="gone">picture not embedded</p>'
            error: Exception | None = None
            for name in case.answers:
                try:
                    self._urls[image] = markup.thumbnail(models[name].open_image(image), side=IMAGE_SIDE)
                    break
                except _UNREADABLE as caught:
                    error = caught
            else:
                assert error is not None
                self._missing(str(image), error)
                return '<p class="gone">picture cannot be read</p>'
        return markup.picture(self._urls[image])

    def _missing(self, what: str, error: Exception) -> None:
        if what not in self._unreadable:
            logging.warning("%s cannot be read: %s", what, error)
            self._unreadable[what] = str(error)


_STYLE = """\
body { overflow-wrap: break-word; }
section { margin: 0 0 2rem; }
thead th { vertical-align: bottom; }
th small, td small { color: var(--soft); font-weight: 400; }
thead small { display: block; font-size: .78rem; }
th.text, td.text { text-align: left; }
td { white-space: nowrap; }
td.text { white-space: normal; min-width: 6.5rem; max-width: 22rem; overflow-wrap: anywhere; }
section table, details table { font-size: .88rem; }
section th, section td, details th, details td { padding: .25rem .4rem; }
section thead th { min-width: 3.6rem; }
details table { font-size: .82rem; }
details th, details td { padding: .2rem .3rem; }
th[scope=row] { min-width: 9rem; overflow-wrap: anywhere; position: sticky; left: 0; background: inherit; }
tr { background: var(--card); }
th[scope=rowgroup] { text-align: left; font-weight: 600; font-size: .88rem; color: var(--soft); padding-top: .7rem; }
tr.published { background: var(--lead); }
tr.published > * { font-style: italic; }
.notes { margin: .5rem 0 0; padding: 0 0 0 1.1rem; color: var(--soft); font-size: .85rem; max-width: 110ch; }
.notes li + li { border: 0; margin: 0; padding: 0; }
details { margin: 0 0 .6rem; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
details caption { display: none; }
#filters { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: 0 0 1rem; position: sticky;
  top: 0; padding: .6rem 0; background: var(--page); z-index: 1; }
#filters[hidden], article[hidden], li[hidden] { display: none; }
select, input { font: inherit; max-width: 22rem; }
output { color: var(--soft); }
.part b { color: var(--soft); }
.gone { color: var(--soft); border: 1px dashed var(--line); padding: 1rem; margin: 0; font-size: .85rem; }
input[type=search] { width: 9rem; }
#filters label { max-width: 100%; }
#filters select { max-width: min(22rem, 100%); }
#cases dl { grid-template-columns: fit-content(10rem) 1fr; }
#cases dt { overflow-wrap: anywhere; }
#cases .kind, #cases dd b { white-space: normal; overflow-wrap: anywhere; }
#cases dd .kind::before { content: "· "; }
"""
