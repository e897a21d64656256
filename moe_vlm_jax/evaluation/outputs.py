"""What an evaluation leaves behind: results.json, predictions.jsonl and a table for the console."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from moe_vlm_jax.evaluation import scorers

# Names of results.json -> column heads, in order.
COLUMNS = ("before", "after", "blind", "shuffled")
PREDICTIONS, PREDICTIONS_BEFORE = "predictions.jsonl", "predictions_before.jsonl"  # files of a workdir


def write_predictions(path: str | os.PathLike, predictions: Sequence[Mapping]) -> None:
    """Writes one JSON object a line; the file is whole or absent, never half written."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))


def read_predictions(path: str | os.PathLike) -> list[dict]:
    """Returns the predictions that write_predictions wrote."""
    with pathlib.Path(path).open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028 and others
        return [json.loads(line) for line in lines]


def write_results(path: str | os.PathLike, results: Mapping[str, scorers.Scores]) -> None:
    """Writes results.json: {"before" | "after" | "blind" | "shuffled": {exact_match, anls, count, per_type}}."""
    values = {name: scores.to_json() for name, scores in results.items()}
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def console_table(results: Mapping[str, scorers.Scores]) -> str:
    """Returns exact match and ANLS of each column of COLUMNS that results has, overall and per question type.

                  questions  before  after  blind  shuffled
    exact match
      all               500      0.002    0.712  0.250     0.180
      image-span        160      0.000    0.806  0.125     0.106
    """
    names = [name for name in COLUMNS if name in results]
    rows = [["", "questions", *names]]
    for metric, title in (("exact_match", "exact match"), ("anls", "ANLS")):
        rows.append([title])
        for kind, count, cells in table_rows(results, names, metric):
            rows.append([f"  {kind}", str(count), *cells])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines of a console: the first column to the left, the others to the right.

    Args:
      rows: the first is as long as any; later ones may end early.
    """
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=False))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table_rows(
    results: Mapping[str, scorers.Scores], names: Sequence[str], metric: str
) -> Iterator[tuple[str, int, list[str]]]:
    """Yields (kind of question, number of questions, a cell for each name), all questions first."""
    kinds = sorted({kind for name in names for kind in results[name].per_type})
    for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
        scores = [results[name] if kind == "all" else results[name].per_type.get(kind) for name in names]
        counts = [s.count for s in scores if s is not None]
        yield kind, max(counts, default=0), ["-" if s is None else f"{getattr(s, metric):.3f}" for s in scores]


def write_atomically(path: str | os.PathLike, text: str) -> None:
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
