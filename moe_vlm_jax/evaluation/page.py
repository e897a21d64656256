"""What a run achieved, for people: one self-contained HTML page of sample images with questions and answers.

The page needs no network and no other file: images are data URLs, the style is inline, nothing is a script. Every
text from the data or the model is escaped.
"""

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import report, scorers

IMAGE_SIDE = 440  # pixels of an image on the page; larger ones are reduced


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
      results: scores by the names of report.COLUMNS.
      num_samples: about how many questions to show, all questions of an image together.
      load_image: image reference -> PIL image.
    """
    now = {row["id"]: row for row in after}
    then = {row["id"]: row for row in before or ()}
    groups = _samples(records, now, num_samples)
    text = PAGE.format(
        title=html.escape(title),
        note=html.escape(note),
        tables="".join(
            _html_table(results, metric, head)
            for metric, head in (("exact_match", "Exact match"), ("anls", f"ANLS ({scorers.ANLS_RULE} rule)"))
        ),
        cards="".join(_card(group, now, then, load_image) for group in groups),
        shown=sum(len(group) for group in groups),
        total=len(now),
    )
    report.write_atomically(path, text)


def _html_table(results: Mapping[str, scorers.Scores], metric: str, head: str) -> str:
    names = [name for name in report.COLUMNS if name in results]
    heads = "".join(f'<th scope="col" class="{name}">{html.escape(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(kind)}</th><td>{count}</td>'
        + "".join(f'<td class="{name}">{cell}</td>' for name, cell in zip(names, cells, strict=True))
        + "</tr>"
        for kind, count, cells in report.table_rows(results, names, metric)
    )
    return (
        f'<div class="scroll"><table><caption>{html.escape(head)}</caption><thead><tr>'
        f'<th scope="col">question type</th><th scope="col">questions</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


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


def _card(
    group: Sequence[records_lib.Record],
    after: Mapping[str, Mapping],
    before: Mapping[str, Mapping],
    load_image: Callable[[Any], Image.Image],
) -> str:
    pictures = "".join(
        f'<img alt="the picture of these questions" src="{_data_url(load_image(ref))}">' for ref in group[0].images
    )
    asked = []
    for record in group:
        now, then = after[record.id], before.get(record.id)
        answers = " <i>or</i> ".join(html.escape(answer) for answer in dict.fromkeys(record.answers))
        lines = [f"<dt>gold</dt><dd>{answers}</dd>"]
        if then is not None:
            lines.append(f"<dt>before</dt>{_verdict(then)}")
        lines.append(f"<dt>{'after' if before else 'model'}</dt>{_verdict(now)}")
        kind = f'<span class="kind">{html.escape(record.answer_type)}</span>' if record.answer_type else ""
        asked.append(f"<li><p>{html.escape(now['question'])} {kind}</p><dl>{''.join(lines)}</dl></li>")
    return f"<article><figure>{pictures}</figure><ol>{''.join(asked)}</ol></article>"


def _verdict(row: Mapping) -> str:
    """Returns the answer with a sign and a word for right or wrong: colour is never the only mark."""
    text = html.escape(row["prediction"]) or "<i>nothing</i>"
    if row["exact_match"]:
        return f'<dd class="right">{text} <b>✓ right</b></dd>'
    near = f" (ANLS {row['anls']:.2f})" if row["anls"] else ""
    return f'<dd class="wrong">{text} <b>✗ wrong{near}</b></dd>'


def _data_url(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    factor = IMAGE_SIDE // max(image.size)
    if factor > 1:  # tiny renderings: whole multiples keep their pixels crisp
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2230; --soft: #5b6475; --line: #d9dee7; --page: #f6f7f9; --card: #fff;
  --right: #0b6b3a; --wrong: #a32020; --lead: #eaf1fb; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ef; --soft: #9aa4b5; --line: #343b48; --page: #14171d;
  --card: #1d2129; --right: #6fd39b; --wrong: #f19a9a; --lead: #223047; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .8rem; }}
.note {{ color: var(--soft); margin: 0 0 1.4rem; max-width: 75ch; }}
.tables {{ display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }}
.scroll {{ max-width: 100%; overflow-x: auto; }}
table {{ border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding: 0 0 .4rem; }}
th, td {{ padding: .3rem .55rem; text-align: right; border-top: 1px solid var(--line); }}
thead th {{ font-weight: 600; color: var(--soft); border-top: 0; }}
th[scope=row], thead th:first-child {{ text-align: left; font-weight: 500; }}
tbody tr:first-child > * {{ font-weight: 700; }}
td.after, th.after {{ background: var(--lead); color: var(--ink); }}
.cards {{ columns: 2 480px; column-gap: 1.25rem; }}
article {{ break-inside: avoid; margin: 0 0 1.25rem; padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; display: flex; gap: 1rem; align-items: flex-start; min-width: 0; }}
figure {{ margin: 0; flex: 0 0 38%; max-width: 38%; display: grid; gap: .5rem; }}
img {{ width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }}
ol {{ margin: 0; padding: 0; list-style: none; flex: 1; min-width: 0; }}
li + li {{ border-top: 1px solid var(--line); margin-top: .7rem; padding-top: .7rem; }}
li p {{ margin: 0 0 .3rem; font-weight: 600; overflow-wrap: anywhere; }}
.kind {{ font-weight: 400; font-size: .8rem; color: var(--soft); white-space: nowrap; }}
dl {{ margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .7rem; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
dd b {{ font-weight: 600; font-size: .85rem; white-space: nowrap; }}
.right b {{ color: var(--right); }}
.wrong b {{ color: var(--wrong); }}
@media (max-width: 640px) {{ article {{ flex-direction: column; }} figure {{ max-width: 260px; flex: none; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{note}</p>
<div class="tables">{tables}</div>
<h2>Samples ({shown} of {total} questions)</h2>
<div class="cards">{cards}</div>
</body>
</html>
"""
