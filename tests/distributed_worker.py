"""What the processes of distributed_test.py run; not a test itself.

    python -m tests.distributed_worker PART FOLDER     one process of a part; its cluster comes from the environment

Parts leave their runs below FOLDER, and process 0 writes <PART>.json. They wait for one another's checkpoints there.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags, logging
from flax import nnx

from moe_vlm_jax import chain, distributed, train, tree
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import load, writers
from moe_vlm_jax.training import checkpoint, loop, setup
from moe_vlm_jax.training import state as state_lib
from tests.training import examples

STEPS, MIDDLE = 4, 2  # of every run; where the checkpoint is that other parts go on from
WAIT_SECONDS = 200


@dataclasses.dataclass(kw_only=True)
class Only(config_lib.Chain):
    """A chain of one run."""

    only: config_lib.RunConfig


def run_config(folder: pathlib.Path, **mesh: int) -> config_lib.RunConfig:
    """Returns a run with every axis length different; the frozen tower is cut over fsdp like the rest."""
    config = examples.run_config(
        folder / "cache",
        trainable=("decoder/.*", "projector/.*"),
        frozen=("vision/.*",),
        batch_size=4,
        accumulation=1,
        max_steps=STEPS,
        loss_chunk=0,
        log_every=1,
        checkpoint_every=MIDDLE,
        keep_checkpoints=5,
    )
    config.model.decoder.num_layers, config.model.moe.placement = 1, "dense"
    config.model.decoder.rotary_dim = config.model.decoder.head_dim  # Qwen2's, which has a checkpoint layout
    config.data.num_images = 20
    config.generation = config_lib.GenerationConfig(max_new_tokens=2)
    config.evaluation = config_lib.EvaluationConfig(max_questions=4, batch_size=4, controls=False, page_samples=2)
    config.mesh = config_lib.MeshConfig(**mesh)
    return config


def alone(folder: pathlib.Path) -> None:
    """One process, one device: what the others must equal; then on from the checkpoint of two processes."""
    run, state = train.train(run_config(folder), folder / "alone")
    _go_on(run, state, folder / "two" / "checkpoints", folder / "alone_from_two")


def two(folder: pathlib.Path) -> None:
    """Two processes with two devices each, 'data' between them; one of them is sent SIGTERM."""
    run, state = train.train(run_config(folder, data=2, fsdp=2), folder / "two")
    _go_on(run, state, folder / "alone" / "checkpoints", folder / "two_from_alone")

    def interrupt(state: state_lib.TrainState) -> dict[str, float]:
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    loop.AGREE_SECONDS = 0.0  # at every step
    workdir = folder / "two_stopped"
    again = _on(run, workdir, every_steps=MIDDLE)
    try:
        loop.fit(again, setup.start(again, _fresh(run)), evaluate=interrupt)
        stopped = None
    except loop.Interrupted as error:
        stopped = [error.step, again.checkpoints.latest_step(), error.code]
    stops = distributed.gather(stopped)
    again = _on(run, workdir)
    loop.fit(again, setup.start(again, _fresh(run)))
    _write(folder / "two.json", {"processes": jax.process_count(), "stops": stops})


def four(folder: pathlib.Path) -> None:
    """Four processes, 'fsdp' and 'expert' between them; what they hold goes into checkpoints in HF layout and back."""
    config = run_config(folder, fsdp=2, expert=2)
    config.data.eval_split, config.evaluation = "", config_lib.EvaluationConfig()
    config.generation = config_lib.GenerationConfig()
    chain_workdir = folder / "four"
    run, state = train.train(config, chain_workdir / "only")
    _go_on(run, state, folder / "two" / "checkpoints", folder / "four_from_two")

    params = nnx.merge_state(state.trainable, run.frozen)
    leaves = {path: variable.get_value() for path, variable in tree.leaves(params).items()}
    spread = [path for path, array in leaves.items() if not array.is_fully_addressable]
    cut = [path for path in spread if not leaves[path].is_fully_replicated]
    whole = distributed.to_leader(leaves)
    if whole is not None:
        writers.write(folder / "model", whole, run.model.config, layout="moe_llava")
    distributed.barrier("the model is written")
    abstract = nnx.merge_state(run.model.trainable, run.model.frozen)
    loaded = load.load_into(abstract, folder / "model", run.model.config).state
    run.checkpoints.close()
    train.train_chain(Only(only=config), chain_workdir)  # goes on where the run is, at its end
    handed_on = load.load_into(abstract, chain.model_folder(chain_workdir, "only"), run.model.config).state
    found = {
        "processes": jax.process_count(),
        "spread": len(spread),
        "cut": len(cut),
        "leaves": len(leaves),
        "written": checkpoint.fingerprint(params),
        "loaded": checkpoint.fingerprint(loaded),
        "handed on": checkpoint.fingerprint(handed_on),
        "numpy": _fingerprint_of_numpy(whole) if whole is not None else "",
    }
    _write(folder / "four.json", found)


def _fingerprint_of_numpy(arrays: dict[str, np.ndarray]) -> str:
    state = nnx.from_flat_state([(tuple(path.split("/")), nnx.Param(array)) for path, array in arrays.items()])
    return checkpoint.fingerprint(state)


def _on(run: setup.Run, workdir: pathlib.Path, *, every_steps: int = 0) -> setup.Run:
    """Returns the run in another workdir, with its compiled programs."""
    config = dataclasses.replace(run.config, evaluation=config_lib.EvaluationConfig(every_steps=every_steps))
    checkpoints = checkpoint.Checkpoints(
        workdir, keep=5, scored=False, base="", fingerprint=checkpoint.fingerprint(run.frozen)
    )
    workdir.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(
        run, config=config, workdir=workdir, checkpoints=checkpoints, iterator=run.data.iterator()
    )


def _go_on(run: setup.Run, state: state_lib.TrainState, source: pathlib.Path, workdir: pathlib.Path) -> None:
    """Continues the run in `workdir` from another run's checkpoint at MIDDLE, once that is there."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (source.parent / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if jax.process_index() == 0:
        shutil.copytree(source / str(MIDDLE), workdir / "checkpoints" / str(MIDDLE))
    distributed.barrier("the checkpoint is copied")
    again = _on(run, workdir)
    restored = setup.start(again, state)
    if int(restored.step) != MIDDLE:
        raise AssertionError(f"went on from step {int(restored.step)}, not {MIDDLE}")
    loop.fit(again, restored)


def _fresh(run: setup.Run) -> state_lib.TrainState:
    trainable, _ = setup.initial_params(run.model, run.config)
    return setup.make_state(run.model, trainable, run.optimizer, run.config.training.seed)[0]


def _write(path: pathlib.Path, value: dict) -> None:
    if jax.process_index() == 0:
        path.write_text(json.dumps(value))


PARTS: dict[str, Callable[[pathlib.Path], None]] = {"alone": alone, "two": two, "four": four}

if __name__ == "__main__":
    part, where = sys.argv[1:]
    flags.FLAGS(["distributed_worker"])
    logging.set_verbosity(logging.INFO)  # as the command lines do
    jax.config.update("jax_default_matmul_precision", "highest")
    distributed.join()
    PARTS[part](pathlib.Path(where))
    distributed.barrier("the end")
