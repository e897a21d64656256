"""All wiring of a training run: config -> mesh, model, optimizer, data, checkpoints, compiled step.

Everything that a user can get wrong is found here, before anything is compiled.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, sharding, tree, validation
from moe_vlm_jax.data import pipeline, stream
from moe_vlm_jax.hf import configs as hf_configs
from moe_vlm_jax.hf import load as hf_load
from moe_vlm_jax.models import adapters, upcycling, vlm
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.quant import tensor as quant_tensor
from moe_vlm_jax.training import checkpoint, coverage, steps
from moe_vlm_jax.training import optimizer as optimizer_lib
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
      optimizer: over the trainable part.
      num_steps: of the whole run.
      data: the planned training data.
      iterator: over host batches.
      checkpoints: of the workdir.
      abstract_state: jax.ShapeDtypeStructs with shardings for the train state.
      train_step: the jitted step.
    """

    config: config_lib.RunConfig
    workdir: pathlib.Path
    model: Model
    mesh: jax.sharding.Mesh
    frozen: nnx.State
    optimizer: optimizer_lib.Optimizer
    num_steps: int
    data: pipeline.TrainData
    iterator: stream.TrainIterator
    checkpoints: checkpoint.Checkpoints
    abstract_state: state_lib.TrainState
    train_step: steps.TrainStep
    _programs: dict[Any, "_Program"] = dataclasses.field(default_factory=dict)

    def compile(self, state: state_lib.TrainState, host_batch: stream.HostBatch) -> None:
        """Compiles the step for the shape of this batch, if that has not been done."""
        shape = _shape(host_batch.batch)
        if shape not in self._programs:
            batch = to_devices(host_batch.batch, self.mesh)
            logging.info("compiling the step for rows of %s", host_batch.batch.tokens.shape)
            compiled = self.train_step.lower(state, self.frozen, batch).compile()
            self._programs[shape] = _Program(compiled, _flops(compiled))

    def step(
        self, state: state_lib.TrainState, host_batch: stream.HostBatch
    ) -> tuple[state_lib.TrainState, steps.Metrics]:
        """Dispatches one step; `state` is donated."""
        self.compile(state, host_batch)
        batch = to_devices(host_batch.batch, self.mesh)
        with jax.transfer_guard_host_to_device("disallow"):
            return self._programs[_shape(host_batch.batch)].compiled(state, self.frozen, batch)

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
    checkpoint.check_workdir(workdir, config)
    model = make_model(config)
    data = pipeline.make_train_data(config, process_index=jax.process_index(), process_count=jax.process_count())
    optimizer_lib.check_groups(config.optimizer, list(tree.leaves(model.trainable)))
    num_steps = config.training.max_steps or data.total_steps(config.training.epochs)
    checkpoint.claim_workdir(workdir, config)  # only now: a workdir is not spent on a config that does not work
    show_coverage(model, workdir)
    config = dataclasses.replace(config, model=model.config)
    trainable, frozen = initial_params(model, config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps)

    state, abstract_state = make_state(model, trainable, optimizer, config.training.seed)
    base = config.training.base or f"the random initialisation of seed {config.training.seed}"
    run = Run(
        config=config,
        workdir=pathlib.Path(workdir),
        model=model,
        mesh=model.mesh,
        frozen=frozen,
        optimizer=optimizer,
        num_steps=num_steps,
        data=data,
        iterator=data.iterator(),
        checkpoints=checkpoint.Checkpoints(
            workdir,
            keep=config.training.keep_checkpoints,
            scored=config.evaluation.every_steps > 0,
            base=base,
            fingerprint=checkpoint.fingerprint(frozen),
        ),
        abstract_state=abstract_state,
        train_step=steps.make_train_step(model.graphdef, optimizer, config, out_shardings=_shardings(abstract_state)),
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

    def new_state(params: nnx.State) -> state_lib.TrainState:
        return state_lib.new_state(params, optimizer.transform, seed)

    shapes = jax.eval_shape(new_state, model.trainable)
    shardings = state_lib.state_shardings(shapes, _shardings(model.trainable), model.mesh)
    state = jax.jit(new_state, donate_argnums=0, out_shardings=shardings)(trainable)
    return state, jax.tree.map(_with_sharding, shapes, shardings)


def start(run: Run, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns the latest checkpoint's state and sets the data to its position, or `state` when there is none."""
    run.iterator.start()
    if run.checkpoints.latest_step() is None:
        return state
    restored = run.checkpoints.restore(run.abstract_state)
    run.iterator.set_state(restored.data)
    return restored.state


def make_model(config: config_lib.RunConfig) -> Model:
    """Returns the model's structure on the mesh; allocates nothing.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or the stage's patterns the parameters.
    """
    mesh = sharding.make_mesh(config.mesh)
    model_config = resolve(config.model, mesh.devices.flat[0].platform)
    abstract = nnx.eval_shape(lambda: vlm.VLM(model_config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)
    params = quantized(params, model_config.quant)
    placed = [
        jax.tree.map(_with_sharding, part, sharding.state_shardings(part, mesh)) for part in _parts(params, config)
    ]
    return Model(model_config, mesh, graphdef, *placed)


def resolve(model: config_lib.ModelConfig, platform: str) -> config_lib.ModelConfig:
    """Returns the config with grouped_matmul='auto' decided: only a TPU has a grouped matmul of its own."""
    if model.moe.grouped_matmul != "auto":
        return model
    chosen = "ragged" if platform == "tpu" else "blocks"
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, grouped_matmul=chosen))


def initial_params(model: Model, config: config_lib.RunConfig) -> tuple[nnx.State, nnx.State]:
    """Returns (trainable, frozen) with the weights before training, made where they will stay.

    Random weights are those of training.seed, whatever the mesh.
    """
    if config.training.base:
        return _base_params(model, config)

    def init(key: jax.Array) -> tuple[nnx.State, nnx.State]:
        params = nnx.state(vlm.VLM(model.config, rngs=nnx.Rngs(key)))
        return _parts(quantized(params, model.config.quant), config)

    shardings = (_shardings(model.trainable), _shardings(model.frozen))
    # The key is an argument, not a constant: one compiled program serves all seeds.
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.training.seed))


def show_coverage(model: Model, workdir: str | pathlib.Path) -> None:
    """Prints what is quantised, adapted, trained and frozen, and writes it to <workdir>/coverage.json."""
    if jax.process_index() != 0:
        return
    found = coverage.rows(model.trainable, model.frozen)
    logging.info("parameters:\n%s", coverage.text(found))
    coverage.write(pathlib.Path(workdir) / "coverage.json", found)


def quantized(params: nnx.State, config: config_lib.QuantConfig) -> nnx.State:
    """Returns parameters, or ShapeDtypeStructs of them, with the kernels that the config names quantised.

    Raises:
      ValueError: see `quant.state.chosen`.
    """
    paths = quant.chosen(list(tree.leaves(params)), config)
    return quant.quantize_state(params, paths, quant.format_of(config))


def narrow(frozen: nnx.State, dtype: str) -> nnx.State:
    """Returns frozen parameters in the dtype they are computed in: nothing accumulates in them.

    Routers compute in float32 and stay so: rounded, they would send tokens to other experts. Quantised leaves stay.
    """

    def cast(path: jax.tree_util.KeyPath, x):
        if quant_tensor.is_quantized(x) or "/router/" in optimizer_lib.leaf_path(path):
            return x
        return jax.ShapeDtypeStruct(x.shape, dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, frozen, is_leaf=quant_tensor.is_quantized)


def to_devices(batch: batch_lib.Batch, mesh: jax.sharding.Mesh) -> batch_lib.Batch:
    """Returns this host's share of a batch as part of the global one, on the devices."""
    shardings = sharding.batch_shardings(batch, mesh, accumulated=True)
    return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)


def _base_params(model: Model, config: config_lib.RunConfig) -> tuple[nnx.State, nnx.State]:
    training = config.training
    fresh_projector = training.base_projector == "random"
    sources = {
        "vision": training.base_vision or None,
        "projector": None if fresh_projector else training.base_projector or None,
        "random_projector_seed": training.seed if fresh_projector else None,
    }
    base = hf_configs.read(training.base, vision=sources["vision"]).config
    if any(model.config.layer_experts) and not any(base.layer_experts):
        logging.info("%s is dense: its MLPs become experts %s", training.base, model.config.layer_experts)
        return _upcycled(model, config, dataclasses.replace(model.config, moe=base.moe), sources)
    abstract, fresh = adapters.split(nnx.merge_state(model.trainable, model.frozen))
    params = hf_load.load_into(abstract, training.base, model.config, **sources).state

    def init(key: jax.Array) -> nnx.State:
        return adapters.split(nnx.state(vlm.VLM(model.config, rngs=nnx.Rngs(key))))[1]

    fresh = jax.jit(init, out_shardings=_shardings(fresh))(jax.random.key(training.seed))
    return _parts(nnx.merge_state(params, fresh), config)


def _upcycled(
    model: Model, config: config_lib.RunConfig, dense: config_lib.ModelConfig, sources: Mapping[str, Any]
) -> tuple[nnx.State, nnx.State]:
    bare = dataclasses.replace(dense, lora=config_lib.LoraConfig())
    abstract = nnx.state(nnx.eval_shape(lambda: vlm.VLM(bare, rngs=nnx.Rngs(0))))
    experts = {"dense_experts": dense.layer_experts, "moe_experts": model.config.layer_experts}
    # What ends up quantised everywhere is quantised while it is read; the rest after growing.
    grown = quant.quantized_leaves(nnx.merge_state(model.trainable, model.frozen))
    sources_of = upcycling.sources(nnx.merge_state(model.trainable, model.frozen), **experts)
    wanted = {path for path in tree.leaves(abstract) if all(t in grown for t in sources_of[path]) and sources_of[path]}
    abstract = quant.quantize_state(abstract, frozenset(wanted), quant.format_of(model.config.quant))
    abstract = jax.tree.map(_with_sharding, abstract, sharding.state_shardings(abstract, model.mesh))
    parent = hf_load.load_into(abstract, config.training.base, bare, **sources).state

    def grow(parent: nnx.State, key: jax.Array) -> tuple[nnx.State, nnx.State]:
        initial = nnx.state(vlm.VLM(model.config, rngs=nnx.Rngs(key)))
        params = upcycling.upcycle(parent, initial, **experts)
        return _parts(quantized(params, model.config.quant), config)

    return jax.jit(grow, out_shardings=(_shardings(model.trainable), _shardings(model.frozen)))(
        parent, jax.random.key(config.training.seed)
    )


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
    return parts["training.trainable"], narrow(parts["training.frozen"], config.model.compute_dtype)


def _with_sharding(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _shardings(state: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, state)


def _shape(batch: batch_lib.Batch) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(batch))


def _flops(compiled: jax.stages.Compiled) -> float | None:
    text = compiled.as_text()
    if text is None:
        return None
    try:
        return cost.program_cost(text).flops
    except ValueError as error:
        logging.info("achieved FLOP/s will not be reported: %s", error)
        return None
