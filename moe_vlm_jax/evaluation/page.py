"""What a run achieved, for people: one self-contained HTML page of sample images with questions and answers.

The page is of markup.py's kind: it needs no network, no other file and no script.
"""

import html
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import markup, outputs, scorers


def write_page(
    path: str | os.PathLike,
    *,
    title: str,
    note: str,
    records: Sequence[records_lib.Record],
    after: Sequence[Mapping],
    before: Sequence[Mapping] | None,
    results: Mapping[str, scorers.Scores],
    num_samples: int,
    load_image: Callable[[Any], Image.Image],
) -> None:
    """Writes the page; whole or absent, never half written.

    Args:
      path: the HTML file.
      title: heading.
      note: one sentence below it, e.g. what the questions and the controls are.
      records: the records that were asked.
      after: predictions for them (`runner.EvaluationResult.predictions`), matched by id.
      before: the same before training, or None.
      results: scores by the names of outputs.COLUMNS.
      num_samples: about how many questions to show, all questions of an image together.
      load_image: image reference -> PIL image.
    """
    now = {row["id"]: row for row in after}
    then = {row["id"]: row for row in before or ()}
    groups = _samples(records, now, num_samples)
    tables = "".join(
        _table(results, metric, head)
        for metric, head in (("exact_match", "Exact match"), ("anls", f"ANLS ({scorers.ANLS_RULE} rule)"))
    )
    cards = "".join(
        markup.card(group[0].images, (_question(record, now, then) for record in group), load_image) for group in groups
    )
    heading = f"<h2>Samples ({sum(len(group) for group in groups)} of {len(now)} questions)</h2>"
    text = markup.document(
        title=title,
        note=note,
        style=_STYLE,
        body=f'<div class="tables">{tables}</div>\n{heading}\n<div class="cards">{cards}</div>',
    )
    outputs.write_atomically(path, text)


def _table(results: Mapping[str, scorers.Scores], metric: str, caption: str) -> str:
    names = [name for name in outputs.COLUMNS if name in results]
    heads = ['<th scope="col">question type</th>', '<th scope="col">questions</th>']
    heads += [f'<th scope="col" class="{name}">{html.escape(name)}</th>' for name in names]
    rows = "".join(
        f'<tr><th scope="row">{html.escape(kind)}</th><td>{count}</td>'
        + "".join(f'<td class="{name}">{cell}</td>' for name, cell in zip(names, cells, strict=True))
        + "</tr>"
        for kind, count, cells in outputs.table_rows(results, names, metric)
    )
    return markup.table(caption=caption, heads=heads, bodies=[rows])


def _samples(
    records: Sequence[records_lib.Record], predictions: Mapping[str, Mapping], num_samples: int
) -> list[list[records_lib.Record]]:
    """Returns groups of records with one image, evenly spaced over the split, until num_samples are reached."""
    groups: dict[Any, list[records_lib.Record]] = {}
    for record in records:
        if record.id in predictions:
            groups.setdefault(record.images or record.id, []).append(record)
    ordered = list(groups.values())
    mean = max(1.0, len(predictions) / max(1, len(ordered)))
    wanted = min(len(ordered), max(1, round(num_samples / mean)))
    return [ordered[i * len(ordered) // wanted] for i in range(wanted)] if ordered and num_samples else []


def _question(record: records_lib.Record, after: Mapping[str, Mapping], before: Mapping[str, Mapping]) -> str:
    now, then = after[record.id], before.get(record.id)
    lines = [("gold", markup.accepted(record.answers))]
    if then is not None:
        lines.append(("before", markup.verdict(then)))
    lines.append(("after" if before else "model", markup.verdict(now)))
    return markup.question(now["question"], record.answer_type, lines)


_STYLE = """\
tbody tr:first-child > * { font-weight: 700; }
td.after, th.after { background: var(--lead); color: var(--ink); }
"""
