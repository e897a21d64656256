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
from moe_vlm_jax.reporting import document, evaluations, folders, intervals, published


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    arguments = _parse(argv)
    with command_line.user_errors():
        for name in ("cases", "images"):
            if getattr(arguments, name) < 0:
                raise ValueError(f"--{name}={getattr(arguments, name)} must be 0 or more; 0 shows none.")
        settings = intervals.Settings(arguments.confidence, arguments.resamples, arguments.seed)
        beside = published.choose([name for name in arguments.published or document.BESIDE if name != "none"])
        found = [one for argument in arguments.results for one in folders.read(argument)]
        evaluations.check_names(found)
        _check_out(arguments.out, found)
        print(
            document.write(
                found,
                arguments.out,
                title=arguments.title,
                beside=beside,
                settings=settings,
                num_cases=arguments.cases,
                max_images=arguments.images,
            )
        )


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
        f"{', '.join(table.id for table in published.tables())}, or none (default {' and '.join(document.BESIDE)})",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
