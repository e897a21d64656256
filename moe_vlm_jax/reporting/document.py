"""Both files of a report: report.md and report.html."""

import pathlib
from collections.abc import Sequence

from moe_vlm_jax.evaluation import outputs
from moe_vlm_jax.reporting import evaluations, intervals, markdown, page, published, published_tables, tables

BESIDE = ("project_report", "moe_llava")  # published tables that stand below measured figures unless others are named


def write(
    found: Sequence[evaluations.Evaluation],
    out: pathlib.Path,
    *,
    title: str,
    beside: Sequence[published.Table],
    settings: intervals.Settings,
    num_cases: int,
    max_images: int,
) -> str:
    """Writes both files and returns what the console shows: the first table, and where the files are.

    Args:
      found: what was evaluated.
      out: the folder to write, made where there is none.
      title: of both.
      beside: published tables whose rows stand below the measured ones.
      settings: of the intervals.
      num_cases: most cases of a benchmark on the page.
      max_images: most pictures on the page.
    """
    titles = evaluations.titles(found)
    measured, others = tables.measured_table(found), published_tables.beside(beside, titles)
    differences = intervals.compare_all(found, settings)
    shown = [measured, *([others] if others else [])]
    shown += [tables.interval_table(differences, settings, titles)] if differences else []
    shown.append(tables.answers_table(found))
    folded = [*tables.detail_tables(found), tables.runs_table(found)]
    folded += map(published_tables.as_printed, published.tables())
    names = [one.name for one in found]
    many = "models" if len(found) > 1 else "model"
    note = f"{len(found)} evaluated {many}: {', '.join(names)}. What is marked as published was not measured here."
    out.mkdir(parents=True, exist_ok=True)
    outputs.write_atomically(out / "report.md", markdown.document(title=title, note=note, tables=[*shown, *folded]))
    text = page.document(
        title=title,
        note=note,
        tables=shown,
        folded=folded,
        found=found,
        num_cases=num_cases,
        max_images=max_images,
    )
    outputs.write_atomically(out / "report.html", text)
    return f"{markdown.render(measured)}\n\nreport: {out / 'report.md'}, {out / 'report.html'}"
