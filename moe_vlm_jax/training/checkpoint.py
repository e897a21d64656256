"""Checkpoints of a run, through Orbax: what trains, the optimizer, progress, the data position and the config.

    <workdir>/config.json              every field of the run's config
    <workdir>/clusters.npz             a copy of model.moe.clusters, for runs that route by it
    <workdir>/checkpoints/<step>/      trainable, optimizer, progress (step and RNG), data, run

Frozen parameters are not saved. They come back from where they came from, a base checkpoint's folder or the seed of
their random initialisation, and a fingerprint of their bits says whether they are still the same.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, tree, validation
from moe_vlm_jax.moe import question_clusters
from moe_vlm_jax.training import state as state_lib

# Fields that may change between two starts of one run: they decide where and how it computes, not what.
# Of clusters, it is what the file holds that must stay.
FREE_FIELDS = ("data.num_workers", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor", "model.moe.clusters")
BEST_METRIC = "exact_match"


class Restored(NamedTuple):
    """Attributes: state; data: the iterator's position, as `Checkpoints.save` was given it."""

    state: state_lib.TrainState
    data: dict[str, Any]


class Checkpoints:
    """Saves and restores train states; keeps the latest few and, when metrics are given, the best."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int, scored: bool, base: str, fingerprint: str):
        """Opens the checkpoints of a workdir; what an interrupted save left behind is removed.

        Args:
          workdir: of the run.
          keep: how many of the latest to keep.
          scored: whether saves come with metrics, so that the best is kept too.
          base: where frozen parameters come from, in words; kept for the error message.
          fingerprint: of the frozen parameters.
        """
        self._identity = {"base": base, "fingerprint": fingerprint}
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep)]
        if scored:
            policies.append(
                checkpoint_managers.BestN(n=1, get_metric_fn=_score, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=_score if scored else None,  # without it, Orbax does not write metrics down
                cleanup_tmp_directories=True,
            ),
        )
        self._scored = scored

    def latest_step(self) -> int | None:
        """Returns the step of the newest finished checkpoint, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the best score, or None when none has one."""
        return self._manager.best_step() if self._scored else None

    def save(self, state: state_lib.TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> int:
        """Starts to save a state and returns its step; the state may be donated as soon as this returns.

        Args:
          state: after some step.
          data: position of the data iterator, JSON values.
          metrics: of an evaluation of this state, with BEST_METRIC.
        """
        step = int(state.step)
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(state.trainable),
            optimizer=ocp.args.StandardSave(state.opt_state),
            progress=ocp.args.StandardSave({"step": state.step, "rng": state.rng}),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave(self._identity),
        )
        self._manager.save(step, args=args, metrics=metrics, force=True)
        logging.info("saving checkpoint %d", step)
        return step

    def restore(self, abstract: state_lib.TrainState, step: int | None = None) -> Restored:
        """Returns a checkpoint, on the devices and in the layout of `abstract`.

        Args:
          abstract: jax.ShapeDtypeStructs with shardings, in the place of every array of the state.
          step: which; None takes the latest.

        Raises:
          ValueError: the frozen parameters are not those that the run was trained with.
        """
        step = self._manager.latest_step() if step is None else step
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run["fingerprint"] != self._identity["fingerprint"]:
            raise ValueError(
                f"checkpoint {step} was trained beside frozen parameters {run['fingerprint']} ({run['base']}), but "
                f"{self._identity['base']} now gives {self._identity['fingerprint']}; restore the original base, or "
                "use another workdir."
            )
        progress = {"step": abstract.step, "rng": abstract.rng}
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(abstract.trainable),
                optimizer=ocp.args.StandardRestore(abstract.opt_state),
                progress=ocp.args.StandardRestore(progress),
                data=ocp.args.JsonRestore(),
            ),
        )
        logging.info("restored checkpoint %d", step)
        state = state_lib.TrainState(
            found["progress"]["step"], found["trainable"], found["optimizer"], found["progress"]["rng"]
        )
        return Restored(state, found["data"])

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the last save and ends the background threads."""
        self._manager.close()


def newest(workdir: str | os.PathLike, abstract: nnx.State, fingerprint: str) -> nnx.State:
    """Returns the trained parameters of a run's newest checkpoint.

    Opened read-only: `Checkpoints` tidies up half-written saves, which may be those of a training that still runs.

    Args:
      workdir: of the run.
      abstract: jax.ShapeDtypeStructs with shardings, in the place of every array.
      fingerprint: of the run's frozen parameters.

    Raises:
      ValueError: no finished checkpoint, or one that was trained beside other frozen parameters.
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{str(workdir)!r} has no checkpoint yet; let the training run on, or start it again.")
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(
                f"{str(workdir)!r} has no finished checkpoint yet; let the training run on, or start it again."
            )
        parts = ocp.args.Composite(trainable=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
        found = manager.restore(step, args=parts)
    if found["run"]["fingerprint"] != fingerprint:
        raise ValueError(
            f"checkpoint {step} of {str(workdir)!r} was trained beside other frozen parameters "
            f"({found['run']['base']}); restore the original base."
        )
    return found["trainable"]


def newest_step(workdir: str | os.PathLike) -> int:
    """Returns the step of a run's newest checkpoint by the names of its folders. ValueError: there is none."""
    folder = pathlib.Path(workdir) / "checkpoints"
    # A save that is not finished has a longer name.
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    if not steps:
        raise ValueError(f"{str(workdir)!r} has no checkpoint yet; let the training run on, or start it again.")
    return max(steps)


def check_workdir(workdir: str | os.PathLike, config: config_lib.RunConfig) -> None:
    """Checks that a workdir is new or belongs to the same run.

    Raises:
      ValueError: the workdir is a URL, or holds a run with another config; lists every field that differs, both values.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(workdir)):
        raise ValueError(
            f"workdir {str(workdir)!r} is a URL, but a workdir is a folder of a file system, which all processes of a "
            "run share; mount the bucket (gcsfuse) or use a network file system, and give that path: see docs/pods.md."
        )
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text(encoding="utf-8")), _fields(config)
    absent = "(absent)"
    differing = [
        f"  {name}: {old.get(name, absent)!r} in the workdir, {new.get(name, absent)!r} now"
        for name in sorted({*old, *new} - set(FREE_FIELDS))
        if old.get(name, absent) != new.get(name, absent)
    ]
    if differing:
        raise ValueError(
            f"workdir {str(workdir)!r} holds a run with another config; use another --workdir, or restore:\n"
            + "\n".join(differing)
        )
    held = path.with_name(question_clusters.FILE)
    if held.exists() and question_clusters.read(held) != question_clusters.read(config.model.moe.clusters):
        raise ValueError(
            f"model.moe.clusters={config.model.moe.clusters!r} are others than those of the run in {str(workdir)!r}; "
            f"name {str(held)!r}, or use another --workdir."
        )


def claim_workdir(workdir: str | os.PathLike, config: config_lib.RunConfig) -> None:
    """Writes the config into a workdir that passed `check_workdir`.

    Raises:
      ValueError: other processes of the run do not see this folder.
    """
    path = pathlib.Path(workdir) / "config.json"
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if config.model.routes_by_question and not path.with_name(question_clusters.FILE).exists():
            question_clusters.copy(config.model.moe.clusters, path.with_name(question_clusters.FILE))
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(_fields(config), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    if jax.process_count() > 1:
        _check_shared(path.parent)


def check_processes(workdir: str | os.PathLike, config: config_lib.RunConfig | config_lib.Chain) -> None:
    """Checks that all processes of a run, or of a chain of runs, were started alike.

    Raises:
      ValueError: another config, or another workdir, on some process.
    """
    fields = {name: value for name, value in _fields(config).items() if not name.endswith("data.num_workers")}
    distributed.check_same(
        fields | {"workdir": str(workdir)}, remedy="start all processes with the same command and the same config file"
    )


def is_workdir(folder: str | os.PathLike) -> bool:
    """Whether a folder is the workdir of a run that has saved itself."""
    return (pathlib.Path(folder) / "config.json").is_file() and (pathlib.Path(folder) / "checkpoints").is_dir()


def read_config(workdir: str | os.PathLike) -> config_lib.RunConfig:
    """Returns the config of the run in a workdir."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{str(workdir)!r} is no workdir of a run: it has no config.json; check the path.")
    config = config_of(json.loads(path.read_text(encoding="utf-8")))
    if config.model.routes_by_question:  # the original may be gone, or another by now
        config.model.moe.clusters = str(path.with_name(question_clusters.FILE))
    return config


def config_of(fields: Mapping[str, Any]) -> config_lib.RunConfig:
    """Returns the config of fields by dotted path, as config.json holds them; others have their defaults."""
    config = config_lib.RunConfig()
    for name, value in fields.items():
        *sections, leaf = name.split(".")
        holder = config
        for section in sections:
            holder = getattr(holder, section)
        setattr(holder, leaf, tuple(value) if isinstance(value, list) else value)
    return config


def fingerprint(state: nnx.State) -> str:
    """Returns a short name of the bits of all parameters; the same wherever and however they are sharded.

    Each leaf gives the sum of its 32-bit (16-, 8-bit) words and the sum weighted by their positions, modulo 2**32:
    integer sums do not depend on the order in which devices add them.
    """
    digest = hashlib.sha256()
    for path, variable in tree.leaves(state).items():
        for array in jax.tree.leaves(variable):
            digest.update(f"{path} {array.shape} {array.dtype} ".encode())
            digest.update(distributed.to_host(_sums(array)).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _sums(array: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    # The position in the flat array, without flattening it: that would gather an array that several devices share.
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    weights = position * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * weights, dtype=jnp.uint32)])


def _check_shared(workdir: pathlib.Path) -> None:
    """Raises ValueError when some process does not see what process 0 writes into the workdir."""
    word = distributed.from_leader(os.urandom(8).hex())
    path = workdir / f".shared-{word}"
    if jax.process_index() == 0:
        path.touch()
    blind = distributed.blind_to(path)
    if jax.process_index() == 0:
        path.unlink()
    if blind:
        raise ValueError(
            f"workdir {str(workdir)!r} is not the same folder on all processes: {', '.join(map(str, blind))} of "
            f"{jax.process_count()} do not see what process 0 wrote; all processes write checkpoints together; "
            "use a folder on a file system that they share."
        )


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[BEST_METRIC]


def _fields(config: config_lib.RunConfig | config_lib.Chain) -> dict[str, Any]:
    """Returns the fields as they look after a trip through JSON, where tuples are lists."""
    return json.loads(json.dumps(validation.flatten(config)))
