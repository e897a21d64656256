"""The runs of a chain compared, from the predictions that each has left in its workdir."""

import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images, sources
from moe_vlm_jax.evaluation import comparison, comparison_page, outputs

FILE = "comparison.html"


def write(workdir: pathlib.Path, runs: Mapping[str, config_lib.RunConfig]) -> str:
    """Writes <workdir>/comparison.html and returns its table and its path, for the console.

    Compared are the model before the first of the runs, then the runs. Where not all of them were asked the same
    questions, the largest set that was is compared, of several the one with the latest run; the log names the others.

    Args:
      workdir: of the chain; each run's files are in <workdir>/<name>.
      runs: finished runs by name, in order.

    Returns:
      '' if no run was evaluated; there is no page then.

    Raises:
      ValueError: an image of a question cannot be read.
    """
    found = {}
    for name, run in runs.items():
        files = [workdir / name / file for file in (outputs.PREDICTIONS, outputs.PREDICTIONS_BEFORE)]
        if not run.data.eval_split:
            logging.info("%s is not in %s: it was not evaluated (data.eval_split='')", name, FILE)
        elif gone := [str(file) for file in files if not file.is_file()]:
            logging.warning("%s is not in %s: %s is gone", name, FILE, " and ".join(gone))
        else:
            found[name] = outputs.read_predictions(files[0])
    if not found:
        return ""
    names = largest_set(found)
    for name, predictions in found.items():
        if differs := comparison.difference(predictions, found[names[0]]):
            logging.info("%s is not in %s: it and %s were asked different questions: %s", name, FILE, names[0], differs)
    before = outputs.read_predictions(workdir / names[0] / outputs.PREDICTIONS_BEFORE)
    compared = {f"before {names[0]}": before, **{name: found[name] for name in names}}
    data, vision = runs[names[-1]].data, runs[names[-1]].model.vision
    comparison_page.write_comparison(
        workdir / FILE,
        title=f"{workdir.name}: {data.source} {data.eval_split}",
        note=f"{len(before)} held-out questions, answered before {names[0]} and after {', '.join(names)}.",
        runs=compared,
        records=sources.load_records(data, data.eval_split),
        num_samples=runs[names[-1]].evaluation.page_samples,
        load_image=images.transform_for(vision, data).load,
    )
    table = comparison.console_table(compared)
    return f"{workdir}, answers to the same held-out questions:\n{table}\ncomparison: {workdir / FILE}"


def largest_set(found: Mapping[str, comparison.Predictions]) -> Sequence[str]:
    """Returns the names of the most runs that were asked the same questions, in order; of several sets the latest."""
    sets: list[list[str]] = []
    for name, predictions in found.items():
        same = next((names for names in sets if not comparison.difference(predictions, found[names[0]])), None)
        if same is None:
            sets.append([name])
        else:
            same.append(name)
    order = list(found)
    return max(sets, key=lambda names: (len(names), order.index(names[-1])))
