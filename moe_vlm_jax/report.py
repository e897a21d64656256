"""Shows evaluated models side by side: tables as Markdown, and one HTML page with the cases behind them.

    python -m moe_vlm_jax.report RESULTS... --out FOLDER
    python -m moe_vlm_jax.report baseline=out/base sft=out/sft dpo=out/dpo --out out/report

RESULTS are folders that `python -m moe_vlm_jax.evaluate` wrote, workdirs of runs (the model before and after) or of
chains (before the first run, and after each); NAME=FOLDER names the row. Writes FOLDER/report.md and
FOLDER/report.html, which needs no network and no other file. A column holds figures of one benchmark, split, metric,
rule, label and judge; published figures have columns of their own. See docs/report.md.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from moe_vlm_jax import command_line
from moe_vlm_jax.evaluation import report as files
from moe_vlm_jax.reporting import (
    evaluations,
    folders,
    intervals,
    markdown,
    page,
    published,
    published_tables,
    tables,
)

_BESIDE = ("project_report", "moe_llava")


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    arguments = _parse(argv)
    with command_line.user_errors():
        for name in ("cases", "images"):
            if getattr(arguments, name) < 0:
                raise ValueError(f"--{name}={getattr(arguments, name)} must be 0 or more; 0 shows none.")
        settings = intervals.Settings(arguments.confidence, arguments.resamples, arguments.seed)
        beside = published.choose([name for name in arguments.published or _BESIDE if name != "none"])
        found = [one for argument in arguments.results for one in folders.read(argument)]
        evaluations.check_names(found)
        _check_out(arguments.out, found)
        print(write(arguments, found, beside, settings))


def write(
    arguments: argparse.Namespace,
    found: Sequence[evaluations.Evaluation],
    beside: Sequence[published.Table],
    settings: intervals.Settings,
) -> str:
    """Writes both files and returns what the console shows: the first table, and where the files are."""
    titles = evaluations.titles(found)
    measured, others = tables.measured_table(found), published_tables.beside(beside, titles)
    differences = intervals.compare_all(found, settings)
    shown = [measured, *([others] if others else [])]
    shown += [tables.interval_table(differences, settings, titles)] if differences else []
    shown.append(tables.answers_table(found))
    folded = [*tables.detail_tables(found), tables.runs_table(found)]
    folded += map(published_tables.as_printed, published.tables())
    title, names = arguments.title, [one.name for one in found]
    note = f"{len(found)} evaluated models: {', '.join(names)}. What is marked as published was not measured here."
    arguments.out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(
        arguments.out / "report.md", markdown.document(title=title, note=note, tables=[*shown, *folded])
    )
    text = page.document(
        title=title,
        note=note,
        tables=shown,
        folded=folded,
        found=found,
        num_cases=arguments.cases,
        max_images=arguments.images,
    )
    files.write_atomically(arguments.out / "report.html", text)
    return f"{markdown.render(measured)}\n\nreport: {arguments.out / 'report.md'}, {arguments.out / 'report.html'}"


def _check_out(out: pathlib.Path, found: Sequence[evaluations.Evaluation]) -> None:
    if any(out.resolve() == one.folder.resolve() for one in found):
        raise ValueError(
            f"--out {str(out)!r} is a folder of results, and a run has its own report.html there; name another folder."
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_vlm_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="FOLDER or NAME=FOLDER")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--title", default="Evaluation report")
    parser.add_argument("--cases", type=int, default=60, help="most cases of a benchmark on the page (default 60)")
    parser.add_argument("--images", type=int, default=200, help="most pictures on the page (default 200)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap samples (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument(
        "--published",
        action="append",
        metavar="TABLE",
        help=f"published table whose rows stand below the measured ones, may be repeated; one of "
        f"{', '.join(table.id for table in published.tables())}, or none (default {' and '.join(_BESIDE)})",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
