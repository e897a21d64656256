"""The plan of a run for one target: the same model, state, batch and step as training's, as shapes, and compiled."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost
from moe_vlm_jax.planning import memory, targets
from moe_vlm_jax.training import coverage, setup
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step on one device; bytes.

    Attributes:
      arguments: parameters, optimizer state and batch, as the compiler lays them out.
      outputs: the new state and the metrics.
      aliased: outputs that take the place of donated arguments.
      temporaries: activations, gradients, dequantised weights, the compiler's copies.
      code: of the program itself.
      peak: most bytes in use at one time; None where the compiler does not tell. A device still needs `needed`: the
        temporaries are one block that is there as long as the program runs.
      flops: of the matmuls; None where the counter cannot tell.
      unknown_flops: why it cannot.
      compile_seconds: of lowering and compiling.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None
    flops: float | None
    unknown_flops: str
    compile_seconds: float

    @property
    def needed(self) -> int:
        """Bytes that the device must have: everything above in its own place, nothing shared over time."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on a target.

    Attributes:
      target: its name.
      kind: the device's own name.
      remark: what a reader of the figures must know, or ''.
      mesh: size of each axis.
      step: micro-batches, rows, slots of a row, images of a micro-batch and tokens of an image.
      coverage: parameters by group: quantised, adapted, trained, frozen.
      parameters: by section of the model.
      groups: what the step takes, by memory.GROUPS.
      capacity: bytes of memory of one device; None where nobody tells.
      program: None where it was not compiled, or did not fit.
      refusal: the compiler's own words when the program is too large for the target, else ''.
    """

    target: str
    kind: str
    remark: str
    mesh: dict[str, int]
    step: dict[str, int]
    coverage: list[coverage.Row]
    parameters: dict[str, memory.Count]
    groups: dict[str, memory.Group]
    capacity: int | None
    program: Program | None
    refusal: str

    @property
    def left(self) -> int | None:
        """Bytes that stay free on a device; None where that is not known."""
        return None if self.program is None or self.capacity is None else self.capacity - self.program.needed

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None where that is not known."""
        if self.refusal:
            return False
        return None if self.left is None else self.left >= 0


class Shapes(NamedTuple):
    """Everything that the step takes, as shapes and places on the target's devices.

    Attributes:
      config: with settings resolved for the target's platform.
      model: structure and layout.
      optimizer: over the trainable part.
      state: of `setup.abstract_state`.
      batch: of `setup.abstract_batch`.
    """

    config: config_lib.RunConfig
    model: setup.Model
    optimizer: optimizer_lib.Optimizer
    state: state_lib.TrainState
    batch: batch_lib.Batch

    def lower(self) -> jax.stages.Lowered:
        """Returns the train step, traced for the target; `.compile()` takes minutes for a large model."""
        step = setup.make_step(self.model, self.optimizer, self.config, self.state)
        return step.lower(self.state, self.model.frozen, self.batch)


def shapes(config: config_lib.RunConfig, devices: Sequence[Any]) -> Shapes:
    """Returns the shapes of a validated config's step on described devices; allocates nothing.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or patterns do not fit the parameters.
    """
    model = setup.make_model(config, devices)
    config = dataclasses.replace(config, model=model.config)
    # How many steps there are is a number in the schedule: any will do.
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.training.max_steps or 1000)
    state = setup.abstract_state(model, optimizer, config.training.seed)
    return Shapes(config, model, optimizer, state, setup.abstract_batch(config, model.mesh))


def make_plan(config: config_lib.RunConfig, target: targets.Target, *, compiled: bool) -> Plan:
    """Returns the plan of a validated config; allocates no array and reads no data.

    Args:
      config: the run's.
      target: of `targets.find`.
      compiled: whether to compile the step too, which takes minutes for a large model.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or patterns do not fit the parameters.
    """
    described = shapes(config, target.devices)
    config, model, batch = described.config, described.model, described.batch
    program, refusal = _compile(described) if compiled else (None, "")
    images = 0 if batch.images is None else batch.images.shape[1]
    shape = {
        "micro_batches": batch.tokens.shape[0],
        "rows": batch.tokens.shape[1],
        "row_length": batch.tokens.shape[2],
        "images": images,
        "tokens_per_image": config.model.vision.num_tokens,
    }
    return Plan(
        target=target.name,
        kind=target.kind,
        remark=target.remark,
        mesh=dict(model.mesh.shape),
        step=shape,
        coverage=coverage.rows(model.trainable, model.frozen),
        parameters=memory.parameters(model),
        groups=memory.groups(model, described.state, batch),
        capacity=target.memory,
        program=program,
        refusal=refusal,
    )


def _compile(described: Shapes) -> tuple[Program | None, str]:
    """Returns the program, or None and the reason when it is too large for its target."""
    begin = time.perf_counter()
    lowered = described.lower()
    logging.info("compiling the step")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, _refusal(str(error))
    seconds = time.perf_counter() - begin
    flops, unknown = cost.known_flops(compiled.as_text())
    figures = compiled.memory_analysis()
    return (
        Program(
            arguments=figures.argument_size_in_bytes,
            outputs=figures.output_size_in_bytes,
            aliased=figures.alias_size_in_bytes,
            temporaries=figures.temp_size_in_bytes,
            code=figures.generated_code_size_in_bytes,
            peak=None
            if described.model.mesh.devices.flat[0].platform == "cpu"
            else figures.peak_memory_in_bytes,  # XLA:CPU's leaves temporaries out
            flops=flops,
            unknown_flops=unknown,
            compile_seconds=seconds,
        ),
        "",
    )


def _refusal(message: str) -> str:
    """Returns the line of XLA's message that has the sizes."""
    found = re.search(r"Used [^\n]*? of [^\n]*", message)
    return found.group(0).strip() if found else message.splitlines()[0]
