"""The plan of a run for one target: the same model, state, batch and step as training's, as shapes, and compiled."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from absl import logging

from moe_vlm_jax import collectives as collectives_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, sharding, traffic
from moe_vlm_jax.planning import chips, memory, meshes, shapes, targets
from moe_vlm_jax.planning import estimate as estimate_lib
from moe_vlm_jax.training import coverage


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over the same mesh axes, in one step on one device; bytes.

    Attributes:
      kind: of collectives.KINDS.
      axes: of the mesh, along which devices exchange.
      count: how many run.
      payload: what they carry, see collectives.Collective.
      sent: what the device sends.
      hidden: the part of `sent` beside which the program goes on.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    payload: float
    sent: float
    hidden: float


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
      memory_traffic: bytes read from and written to main memory in a step; None where the counter cannot tell.
      exchanges: of a step; None where the counter cannot tell.
      unknown_traffic: why one of them cannot, or ''.
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
    memory_traffic: float | None
    exchanges: tuple[Exchange, ...] | None
    unknown_traffic: str
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
      estimate: of a step's time; None where it cannot be made.
      no_estimate: why not, or ''.
      suggestion: the mesh over these devices that fits and sends least, by an estimate; None if none fits, or for one
        device, or where the memory is not known.
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
    estimate: estimate_lib.Estimate | None
    no_estimate: str
    suggestion: meshes.Candidate | None

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


def make_plan(config: config_lib.RunConfig, target: targets.Target, *, compiled: bool) -> Plan:
    """Returns the plan of a validated config; allocates no array and reads no data.

    Args:
      config: the run's.
      target: of `targets.find`.
      compiled: whether to compile the step too, which takes minutes for a large model.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or patterns do not fit the parameters.
    """
    described = shapes.make_shapes(config, target.devices)
    config, model, batch = described.config, described.model, described.batch
    sharding.process_rows(model.mesh, config.training.batch_size, 0)  # refuses rows that the mesh does not divide
    text, program, refusal = _compile(described) if compiled else ("", None, "")
    estimate, no_estimate = None, "" if program is None else _no_estimate(program, target.chip, config)
    if program is not None and target.chip is not None and not no_estimate:
        estimate = estimate_lib.estimate(
            flops=program.flops or 0.0,
            memory_bytes=program.memory_traffic or 0.0,
            collectives=collectives_lib.collectives(text),
            model_flops=_model_flops(described),
            chip=target.chip,
        )
    several = model.mesh.size > 1 and target.memory is not None
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
        groups=memory.groups(model, described.state, batch, described.reference),
        capacity=target.memory,
        program=program,
        refusal=refusal,
        estimate=estimate,
        no_estimate=no_estimate,
        suggestion=meshes.suggest(described, target.memory) if several and target.memory else None,
    )


def _compile(described: shapes.Shapes) -> tuple[str, Program | None, str]:
    """Returns the program's text and figures, or None and the reason when it is too large for its target."""
    begin = time.perf_counter()
    lowered = described.lower()
    logging.info("compiling the step")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "", None, _refusal(str(error))
    seconds = time.perf_counter() - begin
    text = compiled.as_text() or ""
    flops, unknown_flops = cost.known_flops(text or None)
    moved, unknown_moved = _known(traffic.memory_bytes, text)
    found, unknown_found = _known(collectives_lib.collectives, text)
    figures: Any = compiled.memory_analysis()
    mesh = described.model.mesh
    return (
        text,
        Program(
            arguments=figures.argument_size_in_bytes,
            outputs=figures.output_size_in_bytes,
            aliased=figures.alias_size_in_bytes,
            temporaries=figures.temp_size_in_bytes,
            code=figures.generated_code_size_in_bytes,
            # XLA:CPU's peak leaves temporaries out.
            peak=None if mesh.devices.flat[0].platform == "cpu" else figures.peak_memory_in_bytes,
            flops=flops,
            unknown_flops=unknown_flops,
            memory_traffic=moved,
            exchanges=None if found is None else exchanges(found, mesh.shape),
            unknown_traffic=unknown_moved or unknown_found,
            compile_seconds=seconds,
        ),
        "",
    )


def _known(count: Callable[[str], Any], text: str) -> tuple[Any, str]:
    """Returns count(text) and '', or None and the reason why it cannot tell: the program is compiled all the same."""
    if not text:
        return None, "the backend does not show its programs"
    try:
        return count(text), ""
    except ValueError as error:
        return None, str(error)


def exchanges(found: Iterable[collectives_lib.Collective], mesh: Mapping[str, int]) -> tuple[Exchange, ...]:
    """Returns the collectives by kind and axes, the one that sends most first; those of single devices left out."""
    grouped: dict[tuple[str, tuple[str, ...]], list[collectives_lib.Collective]] = {}
    for collective in found:
        axes = collectives_lib.axes_of(collective, mesh)
        if axes:
            grouped.setdefault((collective.kind, axes), []).append(collective)
    summed = [
        Exchange(
            kind=kind,
            axes=axes,
            count=sum(c.count for c in members),
            payload=sum(c.total_bytes for c in members),
            sent=sum(c.total_sent_bytes for c in members),
            hidden=sum(c.total_sent_bytes for c in members if c.asynchronous),
        )
        for (kind, axes), members in grouped.items()
    ]
    return tuple(sorted(summed, key=lambda exchange: -exchange.sent))


def _no_estimate(program: Program, chip: chips.Chip | None, config: config_lib.RunConfig) -> str:
    """Returns why a step's time cannot be estimated, or ''."""
    if chip is None:
        return "the target's rates are not known"
    if program.unknown_flops or program.unknown_traffic:
        return program.unknown_flops or program.unknown_traffic
    if config.model.compute_dtype != "bfloat16":
        return f"published rates are of bfloat16, not of {config.model.compute_dtype}"
    return ""


def _model_flops(described: shapes.Shapes) -> float:
    """Returns the FLOPs that the model needs in a step on one device, k experts active and nothing recomputed."""
    config, batch = described.config, described.batch
    micro_batch = cost.analytic_step_flops(
        config.model,
        num_rows=batch.tokens.shape[1],
        row_length=batch.tokens.shape[2],
        num_images=0 if batch.images is None else batch.images.shape[1],
        trainable=config.training.trainable,
    )
    return micro_batch.total * batch.tokens.shape[0] / described.model.mesh.size


def _refusal(message: str) -> str:
    """Returns the line of XLA's message that has the sizes."""
    found = re.search(r"Used [^\n]*? of [^\n]*", message)
    return found.group(0).strip() if found else message.splitlines()[0]
