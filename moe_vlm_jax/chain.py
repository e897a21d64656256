"""Chains of runs: which runs they are, what each takes from an earlier one, and where it is written.

    <workdir>/<run>/              the workdir of each run
    <workdir>/<run>/model/        the checkpoint that it leaves, in HF layout
    <workdir>/<run>/pairs.jsonl   what it trains on, if that was sampled from an earlier run
    <workdir>/comparison.html     evaluated runs side by side

training.base='@stage1' is the checkpoint of the run stage1, training.adapter='@sft' what the run sft trained, and
preference.pairs='@sft' are pairs sampled from what sft leaves. Standard library only.
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


def parents(run: config_lib.RunConfig) -> dict[str, str]:
    """Returns {field: name} of the fields of a run that take something from another run of the chain."""
    fields = {
        "training.base": run.training.base,
        "training.adapter": run.training.adapter,
        "preference.pairs": run.preference.pairs,
    }
    return {field: value[1:] for field, value in fields.items() if value.startswith("@")}


def model_folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where the run `name` of the chain in a workdir leaves its checkpoint."""
    return workdir / name / "model"


def pairs_file(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where the pairs lie that the run `name` of the chain in a workdir trains on."""
    return workdir / name / "pairs.jsonl"


def placed(run: config_lib.RunConfig, workdir: pathlib.Path, name: str) -> config_lib.RunConfig:
    """Returns the run `name` with files in the place of '@NAME'; how pairs are sampled is the chain's business."""
    taken = parents(run)
    training, preference = run.training, run.preference
    if "training.base" in taken:
        training = dataclasses.replace(training, base=str(model_folder(workdir, taken["training.base"])))
    if "training.adapter" in taken:
        training = dataclasses.replace(training, adapter=str(workdir / taken["training.adapter"]))
    if "preference.pairs" in taken:
        usual = config_lib.PreferenceConfig()
        sampling = {field: getattr(usual, field) for field in ("num_pairs", "temperature", "top_p")}
        preference = dataclasses.replace(preference, pairs=str(pairs_file(workdir, name)), **sampling)
    return dataclasses.replace(run, training=training, preference=preference)


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
            validation.validate(placed(run, pathlib.Path(), name))
        except ValueError as error:
            mistakes += [f"{name}.{line}" for line in str(error).splitlines()]
    mistakes = mistakes or list(_handovers(found))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _handovers(found: Mapping[str, config_lib.RunConfig]) -> Iterator[str]:
    """Yields what is wrong with what runs take from each other."""
    before: list[str] = []
    for name, run in found.items():
        for field, source in parents(run).items():
            where = f"{name}.{field}='@{source}'"
            if source not in before:
                known = f"use {' or '.join(f'@{earlier}' for earlier in before)}" if before else "give a path"
                reason = "itself" if source == name else "a later run" if source in found else "no run of this chain"
                yield f"{where} names {reason}; only what an earlier run leaves can be taken; {known}."
            elif field == "training.base" and not leaves_checkpoint(found[source]):
                yield (
                    f"{where} has adapters or a quantised base, not a whole checkpoint; end the chain with {source}, "
                    "merge it with python -m moe_vlm_jax.merge, and give the merged folder; or take its adapter: "
                    "training.adapter."
                )
            elif field == "training.base":
                yield from _misfits(name, run.model, source, found[source].model)
            elif field == "training.adapter" and found[source].model.lora.rank == 0:
                yield f"{where} has no adapters (model.lora.rank=0); take its checkpoint: training.base."
            elif field == "training.adapter":
                yield from _other_base(name, run, source, found[source])
        before.append(name)


def _other_base(name: str, run: config_lib.RunConfig, source: str, held: config_lib.RunConfig) -> Iterator[str]:
    """Yields in what a run is not on the base that the adapter it starts from was trained on."""
    for field in ("base", "base_vision", "base_projector"):
        mine, theirs = getattr(run.training, field), getattr(held.training, field)
        if mine != theirs:
            yield (
                f"{name}.training.{field}={mine!r}, but its adapter was trained on {source}.training.{field}="
                f"{theirs!r}; they must be equal; change one."
            )


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
