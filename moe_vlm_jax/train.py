"""Trains a model and shows what it learned.

    python -m moe_vlm_jax.train --config configs/sft.py[:ARGUMENT] [--config.a.b=value ...] [--workdir runs/NAME]

Evaluates on held-out questions before and after. The workdir (default runs/<name of the config>) then holds
checkpoints/, metrics.jsonl, tensorboard/, predictions.jsonl, results.json and report.html. The same command again
goes on where an interrupted one stopped. Where the config is a chain of runs, each has a workdir of its own inside
(see chain.py), and a table and comparison.html at the end compare them. On several machines the same command runs on
each of them: see docs/pods.md.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
from absl import flags, logging
from flax import nnx

from moe_vlm_jax import chain, command_line, distributed, ready
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images, sources, tokenize
from moe_vlm_jax.data import pairs as pairs_lib
from moe_vlm_jax.evaluation import blind, chain_comparison, outputs, page, runner, scorers
from moe_vlm_jax.hf import configs
from moe_vlm_jax.preferences import prefer, sampling
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
        """Returns the scores that choose the best checkpoint, and what held-out pairs say."""
        scores = self.answer(run, state).scores
        pairs = run.held_out.measure(nnx.merge_state(state.trainable, run.frozen)) if run.held_out else {}
        held_out = {f"pairs/{name}": value for name, value in pairs.items()}
        return {"exact_match": scores.exact_match, "anls": scores.anls, **held_out}


def train(config: config_lib.RunConfig, workdir: pathlib.Path) -> tuple[setup.Run, state_lib.TrainState]:
    """Runs the whole job, or what is left of it, and returns the run and its last state."""
    with command_line.user_errors():
        checkpoint.check_processes(workdir, config)
        checkpoint.check_workdir(workdir, config)
        exam = Exam(config) if config.data.eval_split else None
        run, untrained = setup.make_run(config, workdir)
    before = _before(run, exam, untrained, workdir / outputs.PREDICTIONS_BEFORE) if exam else []
    _measure_pairs(run, untrained, "before")
    with command_line.user_errors():
        state = setup.start(run, untrained)
    state = loop.fit(run, state, evaluate=functools.partial(exam.score, run) if exam else None)
    _measure_pairs(run, state, "after")
    if exam:
        _report(run, exam, state, before)
    return run, state


def train_chain(config: config_lib.Chain, workdir: pathlib.Path) -> None:
    """Runs all runs of a chain, or what is left of them, each in <workdir>/<name>, and prints them side by side."""
    runs = {name: chain.placed(run, workdir, name) for name, run in chain.runs(config).items()}
    with command_line.user_errors():
        checkpoint.check_processes(workdir, config)
        for name, run_config in runs.items():  # what is wrong with the last run is said before the first one trains
            try:
                _check_run(run_config, workdir / name, taken=chain.parents(getattr(config, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for number, (name, run_config) in enumerate(runs.items(), start=1):
        folder = workdir / name
        if distributed.from_leader(export.read_summary(folder) is None):
            logging.info("run %d of %d: %s in %s", number, len(runs), name, folder)
            if "preference.pairs" in chain.parents(getattr(config, name)):
                with command_line.user_errors():
                    make_pairs(getattr(config, name), name, workdir)
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
        with command_line.user_errors():
            compared = chain_comparison.write(workdir, runs)
        print(compared, end="\n" if compared else "")


def make_pairs(config: config_lib.RunConfig, name: str, workdir: pathlib.Path) -> None:
    """Samples the pairs that the run `name` of a chain trains on from what an earlier run left, by the automatic rule.

    A file that is there is left as it is; what an interrupted sampling left is continued.

    Args:
      config: of the run, with '@NAME' in preference.pairs.
      name: of the run.
      workdir: of the chain.

    Raises:
      ValueError: not one pair came out.
    """
    target, settings = chain.pairs_file(workdir, name), config.preference
    if target.exists():
        return
    source = ready.from_workdir(str(workdir / chain.parents(config)["preference.pairs"]))
    graphdef, params = source.load()

    def preferred(candidates) -> prefer.Preferred:
        return prefer.prefer(candidates, metric="exact_match")

    found = sampling.sample(
        graphdef,
        params,
        source.config,
        sources.load_records(config.data, config.data.split),
        source.tokenizer,
        source.transform,
        target.with_name("candidates.jsonl"),
        settings=sampling.Settings(
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=config.training.seed,
            max_new_tokens=config.generation.max_new_tokens,
        ),
        enough=lambda candidates: len(preferred(candidates).pairs) >= settings.num_pairs,
    )
    made = preferred(found.candidates)
    print(f"{workdir / name}: asked {found.asked} questions twice, {found.equal} gave one response each time")
    print(made.report())
    if not made.pairs:
        raise ValueError(
            f"{name}.preference.pairs: {found.asked} questions gave no pair of which one answer is better "
            "(see the counts above); raise preference.temperature, or mark candidates.jsonl by hand and give the file "
            "of pairs."
        )
    if len(made.pairs) < settings.num_pairs:
        logging.warning("%d pairs came of all questions, fewer than num_pairs=%d", len(made.pairs), settings.num_pairs)
    pairs_lib.write_pairs(target, made.pairs[: settings.num_pairs])


def _check_run(config: config_lib.RunConfig, workdir: pathlib.Path, *, taken: Mapping[str, str]) -> None:
    """Raises ValueError for what can be known to be wrong with a run before what it takes from others exists."""
    checkpoint.check_workdir(workdir, config)
    setup.make_host(config.training.batch_size, setup.make_model(config).mesh)
    if chain.leaves_checkpoint(config):
        export.check(config)
    if config.training.base and "training.base" not in taken and not base.is_saved(config.training.base):
        configs.read(config.training.base, vision=config.training.base_vision or None)
    tokenize.load_tokenizer(config.data.tokenizer)
    if "preference.pairs" in taken and jax.process_count() > 1:
        raise ValueError(
            f"preference.pairs='@{taken['preference.pairs']}' samples on one machine, and this run has "
            f"{jax.process_count()} processes; sample with python -m moe_vlm_jax.preferences generate, and give "
            "the file."
        )
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
    outputs.write_predictions(workdir / outputs.PREDICTIONS, after.predictions)
    outputs.write_results(workdir / "results.json", results)
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
    print(outputs.console_table(results))
    print(f"report: {workdir / 'report.html'}\n")


def _measure_pairs(run: setup.Run, state: state_lib.TrainState, moment: str) -> None:
    """Writes what held-out pairs say, before or after training, into pairs.json; once."""
    path = run.workdir / "pairs.json"
    known = distributed.from_leader(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    if run.held_out is None or moment in known:
        return
    known[moment] = run.held_out.measure(nnx.merge_state(state.trainable, run.frozen))
    if jax.process_index() == 0:
        outputs.write_atomically(path, json.dumps(known, indent=2) + "\n")
        figures = ", ".join(f"{name} {value:.4g}" for name, value in known[moment].items())
        print(f"{run.workdir}, held-out pairs {moment} training: {figures}")


def _before(run: setup.Run, exam: Exam, state: state_lib.TrainState, path: pathlib.Path) -> list[dict]:
    """Returns the predictions before training; kept in a file, so a resumed run does not ask again.

    Process 0 looks at the file and returns them; what another process returns is nobody's.
    """
    if distributed.from_leader(path.exists()):
        if jax.process_index() != 0:
            return []
        return outputs.read_predictions(path)
    logging.info("asking the model before it trains")
    predictions = exam.answer(run, state).predictions
    if jax.process_index() == 0:
        outputs.write_predictions(path, predictions)
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
