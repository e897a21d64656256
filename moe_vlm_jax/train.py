"""Trains a model and shows what it learned.

    python -m moe_vlm_jax.train --config configs/sft.py[:ARGUMENT] [--config.a.b=value ...] [--workdir runs/NAME]

Evaluates on held-out questions before and after. The workdir (default runs/<name of the config>) then holds
checkpoints/, metrics.jsonl, tensorboard/, predictions.jsonl, results.json and report.html. The same command again
goes on where an interrupted one stopped. Where the config is a chain of runs, each has a workdir of its own inside
(see chain.py), and a table at the end compares them. On several machines the same command runs on each of them: see
docs/pods.md.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
from absl import flags, logging
from flax import nnx

from moe_vlm_jax import chain, command_line, distributed
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images, sources, tokenize
from moe_vlm_jax.evaluation import blind, page, report, runner, scorers
from moe_vlm_jax.hf import configs
from moe_vlm_jax.training import base, checkpoint, export, loop, setup
from moe_vlm_jax.training import state as state_lib

_CONFIG = command_line.define_config("configs/sft.py")
distributed.define_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<name of the config>.")


class Exam:
    """The held-out questions of a run, to be answered by any of its states.

    Made before the run: a question that cannot be asked ends the job before anything is compiled.
    """

    def __init__(self, config: config_lib.RunConfig):
        self.transform = images.transform_for(config.model.vision, config.data)
        self._tokenizer = tokenize.load_tokenizer(config.data.tokenizer)
        records = sources.load_records(config.data, config.data.eval_split)
        self._questions = runner.prepare_questions(records, config, self._tokenizer, self.transform)
        asked = hashlib.sha256("\n".join(record.id for record in self._questions.records).encode()).hexdigest()[:16]
        distributed.check_same({"held-out questions": asked}, remedy="give them the same files, see data.path")

    def answer(
        self, run: setup.Run, state: state_lib.TrainState, *, shuffle_images: bool = False
    ) -> runner.EvaluationResult:
        """Returns the answers of a state and their scores."""
        return runner.ask(
            run.model.graphdef,
            nnx.merge_state(state.trainable, run.frozen),
            run.config,
            self._questions,
            self._tokenizer,
            self.transform,
            shuffle_images=shuffle_images,
        )

    def score(self, run: setup.Run, state: state_lib.TrainState) -> dict[str, float]:
        """Returns the scores that choose the best checkpoint."""
        scores = self.answer(run, state).scores
        return {"exact_match": scores.exact_match, "anls": scores.anls}


def train(config: config_lib.RunConfig, workdir: pathlib.Path) -> tuple[setup.Run, state_lib.TrainState]:
    """Runs the whole job, or what is left of it, and returns the run and its last state."""
    with command_line.user_errors():
        checkpoint.check_processes(workdir, config)
        checkpoint.check_workdir(workdir, config)
        exam = Exam(config) if config.data.eval_split else None
        run, untrained = setup.make_run(config, workdir)
    before = _before(run, exam, untrained, workdir / "predictions_before.jsonl") if exam else []
    with command_line.user_errors():
        state = setup.start(run, untrained)
    state = loop.fit(run, state, evaluate=functools.partial(exam.score, run) if exam else None)
    if exam:
        _report(run, exam, state, before)
    return run, state


def train_chain(config: config_lib.Chain, workdir: pathlib.Path) -> None:
    """Runs all runs of a chain, or what is left of them, each in <workdir>/<name>, and prints them side by side."""
    runs = {name: chain.placed(run, workdir) for name, run in chain.runs(config).items()}
    with command_line.user_errors():
        checkpoint.check_processes(workdir, config)
        for name, run_config in runs.items():  # what is wrong with the last run is said before the first one trains
            try:
                _check_run(run_config, workdir / name, made_here=chain.parent(getattr(config, name)) is not None)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for number, (name, run_config) in enumerate(runs.items(), start=1):
        folder = workdir / name
        if distributed.from_leader(export.read_summary(folder) is None):
            logging.info("run %d of %d: %s in %s", number, len(runs), name, folder)
            run, state = train(run_config, folder)
            run.checkpoints.close()
            run.iterator.close()
            if chain.leaves_checkpoint(run_config):
                params = nnx.merge_state(state.trainable, run.frozen)
                with command_line.user_errors():
                    export.write_model(chain.model_folder(workdir, name), params, run.config)
            if jax.process_index() == 0:
                export.write_summary(folder, name, state.trainable, run.num_steps)
            distributed.barrier(f"{name} is finished")
    if jax.process_index() == 0:
        print(f"{workdir}, held-out questions before and after each run:")
        print(export.table([found for name in runs if (found := export.read_summary(workdir / name))]))


def _check_run(config: config_lib.RunConfig, workdir: pathlib.Path, *, made_here: bool) -> None:
    """Raises ValueError for what can be known to be wrong with a run before its base exists."""
    checkpoint.check_workdir(workdir, config)
    setup.make_host(config.training.batch_size, setup.make_model(config).mesh)
    if chain.leaves_checkpoint(config):
        export.check(config)
    if config.training.base and not made_here and not base.is_saved(config.training.base):
        configs.read(config.training.base, vision=config.training.base_vision or None)
    tokenize.load_tokenizer(config.data.tokenizer)
    for split in filter(None, (config.data.split, config.data.eval_split)):
        sources.load_records(config.data, split)


def _report(run: setup.Run, exam: Exam, state: state_lib.TrainState, before: list[dict]) -> None:
    """Asks the trained model and writes down what it and the controls score."""
    config, workdir = run.config, run.workdir
    after = exam.answer(run, state)
    shuffled = exam.answer(run, state, shuffle_images=True) if config.evaluation.controls else None
    if jax.process_index() != 0:
        return
    results = {"before": scorers.aggregate(before), "after": after.scores}
    if shuffled is not None:
        known = sources.load_records(config.data, config.data.split)
        results["blind"] = blind.best_blind_baseline(known, after.asked).scores
        results["shuffled"] = shuffled.scores
    report.write_predictions(workdir / "predictions.jsonl", after.predictions)
    report.write_results(workdir / "results.json", results)
    page.write_page(
        workdir / "report.html",
        title=f"{workdir.name}: {config.data.source} {config.data.eval_split}",
        note=f"Held-out questions, answered after {run.num_steps} steps.",
        records=after.asked,
        after=after.predictions,
        before=before,
        results=results,
        num_samples=config.evaluation.page_samples,
        load_image=exam.transform.load,
    )
    print(f"{workdir}, held-out questions:")
    print(report.console_table(results))
    print(f"report: {workdir / 'report.html'}\n")


def _before(run: setup.Run, exam: Exam, state: state_lib.TrainState, path: pathlib.Path) -> list[dict]:
    """Returns the predictions before training; kept in a file, so a resumed run does not ask again.

    Process 0 looks at the file and returns them; what another process returns is nobody's.
    """
    if distributed.from_leader(path.exists()):
        if jax.process_index() != 0:
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    logging.info("asking the model before it trains")
    predictions = exam.answer(run, state).predictions
    if jax.process_index() == 0:
        report.write_predictions(path, predictions)
    return predictions


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    with command_line.user_errors():
        distributed.join()
    command_line.use_compilation_cache()
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value or f"runs/{command_line.config_name()}")
    if isinstance(config, config_lib.Chain):
        train_chain(config, workdir)
    else:
        train(config, workdir)
    distributed.barrier("the run is over")


if __name__ == "__main__":
    command_line.run(main, chains=True)
