"""Chains of runs: which runs they are, what each takes from an earlier one, and where it is written.

    <workdir>/<run>/         the workdir of each run
    <workdir>/<run>/model/   the checkpoint that it leaves, in HF layout

training.base='@stage1' is the checkpoint of the run stage1. Standard library only.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation

# What may differ between a checkpoint and the model that reads it: how parameters are used or drawn, not which exist.
_FREE = {"max_positions", "embed_dropout", "residual_dropout", "embed_init_std", "position_init_std"}


def runs(config: config_lib.RunConfig | config_lib.Chain) -> dict[str, config_lib.RunConfig]:
    """Returns the runs of a chain by name, in order; a single run has the name ''."""
    if isinstance(config, config_lib.RunConfig):
        return {"": config}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def parent(run: config_lib.RunConfig) -> str | None:
    """Returns the name of the run whose checkpoint a run starts from, or None."""
    return run.training.base[1:] if run.training.base.startswith("@") else None


def model_folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where the run `name` of the chain in a workdir leaves its checkpoint."""
    return workdir / name / "model"


def placed(run: config_lib.RunConfig, workdir: pathlib.Path) -> config_lib.RunConfig:
    """Returns the run with the folder of its base in the place of '@NAME'."""
    name = parent(run)
    if name is None:
        return run
    training = dataclasses.replace(run.training, base=str(model_folder(workdir, name)))
    return dataclasses.replace(run, training=training)


def leaves_checkpoint(run: config_lib.RunConfig) -> bool:
    """Whether a run's result is a whole checkpoint; adapters and quantised bases are merged by moe_vlm_jax.merge."""
    return run.model.lora.rank == 0 and run.model.quant.kind == "none"


def validate(config: config_lib.RunConfig | config_lib.Chain) -> None:
    """Checks every rule of one run, or of all runs of a chain and of what they hand to each other.

    Raises:
      ValueError: all mistakes, one line each: value, rule, remedy.
    """
    if isinstance(config, config_lib.RunConfig):
        validation.validate(config)
        return
    found = runs(config)
    if wrong := [name for name, run in found.items() if not isinstance(run, config_lib.RunConfig)]:
        raise ValueError(f"fields {', '.join(wrong)} of the chain hold no RunConfig; give each one.")
    if not found:
        raise ValueError("the chain has no runs; give its class fields that are RunConfigs.")
    mistakes = []
    for name, run in found.items():
        try:
            validation.validate(placed(run, pathlib.Path()))
        except ValueError as error:
            mistakes += [f"{name}.{line}" for line in str(error).splitlines()]
    mistakes = mistakes or list(_handovers(found))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _handovers(found: Mapping[str, config_lib.RunConfig]) -> Iterator[str]:
    """Yields what is wrong with the bases that runs take from each other."""
    before: list[str] = []
    for name, run in found.items():
        source = parent(run)
        where = f"{name}.training.base={run.training.base!r}"
        if source is not None and source not in before:
            known = f"use {' or '.join(f'@{earlier}' for earlier in before)}" if before else "give a folder"
            reason = "itself" if source == name else "a later run" if source in found else "no run of this chain"
            yield f"{where} names {reason}; only an earlier run's checkpoint can be a base; {known}."
        elif source is not None and not leaves_checkpoint(found[source]):
            yield (
                f"{where} has adapters or a quantised base, not a whole checkpoint; end the chain with {source}, merge "
                "it with python -m moe_vlm_jax.merge, and give the merged folder."
            )
        elif source is not None:
            yield from _misfits(name, run.model, source, found[source].model)
        before.append(name)


def _misfits(name: str, model: config_lib.ModelConfig, source: str, held: config_lib.ModelConfig) -> Iterator[str]:
    """Yields in what a model does not fit the checkpoint that it starts from, quantities that decide its shapes."""
    fewer = held.decoder.max_positions
    if model.decoder.max_positions > fewer:
        yield (
            f"{name}.model.decoder.max_positions={model.decoder.max_positions} exceeds the {fewer} of its base "
            f"{source}; lower it, or raise the other."
        )
    for section in ("vision", "decoder"):
        mine, theirs = getattr(model, section), getattr(held, section)
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if a != b and field.name not in _FREE:
                path = f"model.{section}.{field.name}"
                yield f"{name}.{path}={a!r}, but its base {source}.{path}={b!r}; they must be equal; change one."
    if model.projector != held.projector:
        yield (
            f"{name}.model.projector={model.projector!r}, but its base {source}.model.projector={held.projector!r}; "
            "they must be equal; change one."
        )
    experts = (model.layer_experts, model.moe.use_residual)
    if any(held.layer_experts) and experts != (held.layer_experts, held.moe.use_residual):
        yield (
            f"{name} has experts by layer {model.layer_experts}, but its base {source} has {held.layer_experts}; "
            "only a dense base can be given experts; make layers, numbers and use_residual of model.moe equal."
        )
