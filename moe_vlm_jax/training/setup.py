"""All wiring of a training run: config -> mesh, model, optimizer, data, checkpoints, compiled step.

Everything that a user can get wrong is found here, before anything is compiled.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, distributed, sharding, tree, validation
from moe_vlm_jax.analysis import drawing
from moe_vlm_jax.data import host as host_lib
from moe_vlm_jax.data import pipeline, stream, trees
from moe_vlm_jax.models import vlm
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.training import base, checkpoint, coverage, pair_scores, preference_step, steps, stgc_step
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import reference as reference_lib
from moe_vlm_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Model:
    """Structure and layout of a model before it has weights.

    Attributes:
      config: with settings resolved for the mesh's platform.
      mesh: its devices.
      graphdef: structure.
      trainable, frozen: jax.ShapeDtypeStructs with shardings in the place of arrays.
    """

    config: config_lib.ModelConfig
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State


@dataclasses.dataclass
class Run:
    """Everything a run needs but the state that changes.

    Attributes:
      config: the run's, with settings resolved for the platform.
      workdir: where it writes.
      model: structure and layout.
      mesh: devices.
      frozen: parameters that do not train, on the devices.
      reference: what the policy is compared with in a step, in the form of the trainable parameters, or None.
      optimizer: over the trainable part.
      num_steps: of the whole run.
      data: the planned training data.
      iterator: over host batches.
      checkpoints: of the workdir.
      abstract_state: jax.ShapeDtypeStructs with shardings for the train state.
      train_step: the jitted step.
      held_out: preference pairs to measure, or None.
    """

    config: config_lib.RunConfig
    workdir: pathlib.Path
    model: Model
    mesh: jax.sharding.Mesh
    frozen: nnx.State
    reference: nnx.State | None
    optimizer: optimizer_lib.Optimizer
    num_steps: int
    data: pipeline.TrainData
    iterator: stream.TrainIterator
    checkpoints: checkpoint.Checkpoints
    abstract_state: state_lib.TrainState
    train_step: steps.TrainStep
    held_out: pair_scores.HeldOut | None = None
    _programs: dict[Any, "_Program"] = dataclasses.field(default_factory=dict)

    def compile(self, state: state_lib.TrainState, host_batch: stream.HostBatch) -> None:
        """Compiles the step for the shape of this batch, if that has not been done."""
        shape = _shape(host_batch.batch)
        if shape not in self._programs:
            batch = to_devices(host_batch.batch, self.mesh, self.config.training.batch_size)
            logging.info("compiling the step for rows of %s", host_batch.batch.tokens.shape)
            compiled = self.train_step.lower(state, self.frozen, batch, self.reference).compile()
            self._programs[shape] = _Program(compiled, _flops(compiled))

    def step(
        self, state: state_lib.TrainState, host_batch: stream.HostBatch
    ) -> tuple[state_lib.TrainState, steps.Metrics]:
        """Dispatches one step; `state` is donated."""
        self.compile(state, host_batch)
        batch = to_devices(host_batch.batch, self.mesh, self.config.training.batch_size)
        with jax.transfer_guard_host_to_device("disallow"):
            return self._programs[_shape(host_batch.batch)].compiled(state, self.frozen, batch, self.reference)

    def flops(self, host_batch: stream.HostBatch) -> float | None:
        """Returns the FLOPs of a step on one device, or None where the counter cannot tell."""
        return self._programs[_shape(host_batch.batch)].flops


@dataclasses.dataclass(frozen=True)
class _Program:
    compiled: jax.stages.Compiled
    flops: float | None


def make_run(config: config_lib.RunConfig, workdir: str | pathlib.Path) -> tuple[Run, state_lib.TrainState]:
    """Returns a run and its state before the first step; `start` goes on from a checkpoint if there is one.

    Args:
      config: not yet validated.
      workdir: where it writes; created if need be.

    Raises:
      ValueError: anything wrong with the config, the base checkpoint, the data or the workdir.
    """
    validation.validate(config)
    if config.training.routing_images_every:
        drawing.require()
    checkpoint.check_workdir(workdir, config)
    model = make_model(config)
    host = make_host(config.training.batch_size, model.mesh)
    data = pipeline.make_train_data(config, host)
    held_out = pipeline.make_held_out_pairs(config, host) if config.preference.loss != "none" else None
    distributed.check_same({"training data": data.fingerprint}, remedy="give them the same files, see data.path")
    optimizer_lib.check_groups(config.optimizer, list(tree.leaves(model.trainable)))
    num_steps = config.training.max_steps or data.total_steps(config.training.epochs)
    trainable, frozen = initial_params(model, config)
    checkpoint.claim_workdir(workdir, config)  # only now: a workdir is not spent on a config that does not work
    show_coverage(model, workdir)
    config = dataclasses.replace(config, model=model.config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps)
    reference = reference_lib.make(trainable, frozen, config) if reference_lib.is_needed(config) else None
    measured = held_out and _held_out(held_out, model, reference, frozen, config)
    if config.preference.precomputed and reference is not None:
        data = _with_reference(data, model, reference, frozen, config, pathlib.Path(workdir))
        reference = None

    state, abstract = make_state(model, trainable, optimizer, config.training.seed)
    origin = config.training.base or f"the random initialisation of seed {config.training.seed}"
    run = Run(
        config=config,
        workdir=pathlib.Path(workdir),
        model=model,
        mesh=model.mesh,
        frozen=frozen,
        reference=reference,
        optimizer=optimizer,
        num_steps=num_steps,
        data=data,
        iterator=data.iterator(),
        checkpoints=checkpoint.Checkpoints(
            workdir,
            keep=config.training.keep_checkpoints,
            scored=config.evaluation.every_steps > 0,
            base=origin,
            fingerprint=checkpoint.fingerprint(frozen),
        ),
        abstract_state=abstract,
        train_step=make_step(model, optimizer, config, abstract),
        held_out=measured,
    )
    return run, state


def make_state(
    model: Model, trainable: nnx.State, optimizer: optimizer_lib.Optimizer, seed: int
) -> tuple[state_lib.TrainState, state_lib.TrainState]:
    """Returns the state before the first step, and jax.ShapeDtypeStructs with shardings in the place of its arrays.

    Args:
      model: the layout.
      trainable: parameters; donated.
      optimizer: over them.
      seed: of the run's own key.
    """
    abstract = abstract_state(model, optimizer, seed)
    new_state = functools.partial(state_lib.new_state, transform=optimizer.transform, seed=seed)
    return jax.jit(new_state, donate_argnums=0, out_shardings=base.shardings(abstract))(trainable), abstract


def abstract_state(model: Model, optimizer: optimizer_lib.Optimizer, seed: int) -> state_lib.TrainState:
    """Returns the shapes and places of the train state, see `make_state`; allocates nothing."""
    new_state = functools.partial(state_lib.new_state, transform=optimizer.transform, seed=seed)
    shapes = jax.eval_shape(new_state, model.trainable)
    shardings = state_lib.state_shardings(shapes, base.shardings(model.trainable), model.mesh)
    return jax.tree.map(_with_sharding, shapes, shardings)


def abstract_batch(config: config_lib.RunConfig, mesh: jax.sharding.Mesh) -> batch_lib.Batch:
    """Returns the shapes and places of the longest batch that the config allows; reads no data."""
    row_length, vision = max(config.data.row_lengths), config.model.vision
    micro_batch = trees.collate(
        [()] * config.training.batch_size,
        row_length=row_length,
        images_per_row=stream.images_per_row(config.data.images_per_row, row_length, vision.num_tokens),
        num_patches=vision.num_tokens,
        image_size=vision.image_size,
        load_image=lambda reference: reference,  # there are none
    )
    if config.preference.precomputed:
        known = np.zeros((config.training.batch_size, batch_lib.max_pairs(row_length), 2), np.float32)
        micro_batch = micro_batch._replace(reference_log_probs=known)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.training.accumulation, *x.shape), x.dtype), micro_batch
    )
    return jax.tree.map(_with_sharding, shapes, sharding.batch_shardings(shapes, mesh, accumulated=True))


def make_step(
    model: Model, optimizer: optimizer_lib.Optimizer, config: config_lib.RunConfig, abstract: state_lib.TrainState
) -> steps.TrainStep:
    """Returns the jitted step whose new state lies where `abstract_state` says."""
    objective = steps.SUPERVISED if config.preference.loss == "none" else preference_step.PREFERENCE
    if config.training.stgc.coefficient:
        stgc_step.check(config.model, config.training.stgc, frozenset(tree.leaves(model.trainable)))
        objective = stgc_step.OBJECTIVE
    return steps.make_train_step(
        model.graphdef, optimizer, config, objective=objective, out_shardings=base.shardings(abstract)
    )


def start(run: Run, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns the latest checkpoint's state and sets the data to its position, or `state` when there is none."""
    run.iterator.start()
    # Process 0 says which: another one may not see the newest folder of a network file system yet.
    step = distributed.from_leader(run.checkpoints.latest_step())
    if step is None:
        return state
    restored = run.checkpoints.restore(run.abstract_state, step)
    run.iterator.set_state(restored.data)
    return restored.state


def make_model(config: config_lib.RunConfig, devices: Sequence[Any] | None = None) -> Model:
    """Returns the model's structure on the mesh; allocates nothing.

    Args:
      config: the run's.
      devices: of the mesh, which may be described ones that nothing can run on; None: all that jax finds.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or the stage's patterns the parameters.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    model_config = resolve(config.model, mesh.devices.flat[0].platform)
    abstract = nnx.eval_shape(lambda: vlm.VLM(model_config, rngs=nnx.Rngs(0), mesh=mesh if mesh.size > 1 else None))
    graphdef, params = nnx.split(abstract)
    params = quant.quantize_chosen(params, model_config.quant)
    placed = [
        jax.tree.map(_with_sharding, part, sharding.state_shardings(part, mesh)) for part in _parts(params, config)
    ]
    return Model(model_config, mesh, graphdef, *placed)


def resolve(model: config_lib.ModelConfig, platform: str) -> config_lib.ModelConfig:
    """Returns the config with grouped_matmul='auto' decided by what the platform multiplies well (moe/dropless.py)."""
    if model.moe.grouped_matmul != "auto":
        return model
    chosen = {"tpu": "ragged", "gpu": "slots"}.get(platform, "blocks")
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, grouped_matmul=chosen))


def initial_params(model: Model, config: config_lib.RunConfig) -> tuple[nnx.State, nnx.State]:
    """Returns (trainable, frozen) with the weights before training, made where they will stay.

    Random weights are those of training.seed, whatever the mesh.
    """

    def init(key: jax.Array) -> tuple[nnx.State, nnx.State]:
        params = nnx.state(vlm.VLM(model.config, rngs=nnx.Rngs(key)))
        return _parts(quant.quantize_chosen(params, model.config.quant), config)

    if config.training.base:
        abstract = nnx.merge_state(model.trainable, model.frozen)
        made = _parts(base.load(abstract, model.config, config.training, model.mesh), config)
    else:
        shardings = (base.shardings(model.trainable), base.shardings(model.frozen))
        # The key is an argument, not a constant: one compiled program serves all seeds.
        made = jax.jit(init, out_shardings=shardings)(jax.random.key(config.training.seed))
    base.check_words(model.config, made[1])
    return made


def show_coverage(model: Model, workdir: str | pathlib.Path) -> None:
    """Prints what is quantised, adapted, trained and frozen, and writes it to <workdir>/coverage.json."""
    if jax.process_index() != 0:
        return
    found = coverage.rows(model.trainable, model.frozen)
    logging.info("parameters:\n%s", coverage.text(found))
    coverage.write(pathlib.Path(workdir) / "coverage.json", found)


def make_host(batch_size: int, mesh: jax.sharding.Mesh) -> host_lib.Host:
    """Returns this process's share of the data.

    Args:
      batch_size: rows of a micro-batch.
      mesh: whose devices hold them.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    rows = sharding.process_rows(mesh, batch_size, jax.process_index())
    return host_lib.Host(rows, jax.process_index(), jax.process_count(), distributed.gather)


def to_devices(batch: batch_lib.Batch, mesh: jax.sharding.Mesh, batch_size: int | None = None) -> batch_lib.Batch:
    """Returns this process's rows of a batch as part of the global one, on the devices.

    Args:
      batch: numpy arrays with the rows of `make_host`, behind the axis of micro-batches.
      mesh: of the devices.
      batch_size: rows of a micro-batch, over all processes; None: these are all of them.
    """
    own_rows = batch.tokens.shape[1]
    all_rows = batch_size or own_rows

    def whole(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * all_rows // own_rows, *x.shape[2:]), x.dtype)

    shapes = jax.tree.map(whole, batch)
    shardings = sharding.batch_shardings(shapes, mesh, accumulated=True)
    return jax.tree.map(
        lambda x, shape, place: jax.make_array_from_process_local_data(place, x, shape.shape), batch, shapes, shardings
    )


def _scorer(data: pipeline.TrainData, model: Model, config: config_lib.RunConfig) -> pair_scores.Scorer:
    place = functools.partial(to_devices, mesh=model.mesh, batch_size=config.training.batch_size)
    return pair_scores.Scorer(data, model.graphdef, config, place)


def _held_out(
    data: pipeline.TrainData, model: Model, reference: nnx.State | None, frozen: nnx.State, config: config_lib.RunConfig
) -> pair_scores.HeldOut:
    scorer = _scorer(data, model, config)
    scores = None if reference is None else scorer(nnx.merge_state(reference, frozen))
    return pair_scores.HeldOut(scorer, scores, config.preference.beta)


def _with_reference(
    data: pipeline.TrainData,
    model: Model,
    reference: nnx.State,
    frozen: nnx.State,
    config: config_lib.RunConfig,
    workdir: pathlib.Path,
) -> pipeline.TrainData:
    """Returns the data with the reference's log-probs from preference.precomputed, which is written if need be."""
    scores = pair_scores.reference_scores(
        workdir / config.preference.precomputed,
        data,
        pair_scores.fingerprints(data, frozen, reference, config),
        lambda: _scorer(data, model, config)(nnx.merge_state(reference, frozen)),
    )
    return data.with_reference(scores)


def _parts(params: nnx.State, config: config_lib.RunConfig) -> tuple[nnx.State, nnx.State]:
    """Returns (trainable, frozen) of arrays or ShapeDtypeStructs, the frozen part in its own dtype."""
    groups = {"training.trainable": config.training.trainable, "training.frozen": config.training.frozen}
    parts = tree.partition(params, groups)
    trained = list(quant.quantized_leaves(parts["training.trainable"]))
    if trained:
        raise ValueError(
            f"{len(trained)} quantised parameters would train ({trained[0]!r}, ...), but codes have no gradient; move "
            "them to training.frozen (stages.LORA trains adapters), or narrow model.quant.targets."
        )
    moving = [path for path in tree.leaves(parts["training.trainable"]) if path.startswith("decoder/embed/")]
    if moving and config.model.routes_by_question:
        raise ValueError(
            f"{moving[0]!r} would train, but model.moe.router='cluster' compares questions by their word embeddings "
            "with centroids that stay; freeze it."
        )
    return parts["training.trainable"], base.narrow(parts["training.frozen"], config.model.compute_dtype)


def _with_sharding(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _shape(batch: batch_lib.Batch) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(batch))


def _flops(compiled: jax.stages.Compiled) -> float | None:
    flops, unknown = cost.known_flops(compiled.as_text())
    if unknown:
        logging.info("achieved FLOP/s will not be reported: %s", unknown)
    return flops
