"""Activated parameters of an evaluated model, counted on the shapes that its config gives."""

import dataclasses
import functools

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation
from moe_vlm_jax.hf import configs
from moe_vlm_jax.models import size
from moe_vlm_jax.reporting.evaluations import Parameters
from moe_vlm_jax.reporting.json_fields import Fields
from moe_vlm_jax.training import checkpoint

LANGUAGE_MODEL = "language model"


def of_config(model: config_lib.ModelConfig) -> Parameters:
    """Returns the parameters of the language model, which is what papers mean by "3.6B activated".

    Adapters and quantisation are left out: they are how this model was trained and is stored.
    """
    return _count(dataclasses.replace(model, quant=config_lib.QuantConfig(), lora=config_lib.LoraConfig()))


def of_manifest(manifest: Fields) -> tuple[Parameters | None, list[str]]:
    """Returns the parameters of an evaluated checkpoint, and what a reader has to know of them.

    The model's config is in the manifest, or beside the checkpoint where that is still at hand; else the manifest's own
    figures have to do.
    """
    model = _from_manifest(manifest)
    if model is None:
        model = _from_checkpoint(manifest)
    if model is not None:
        return of_config(model), []
    if manifest.values.get("parameters"):
        counts = manifest.section("parameters")
        total, activated = counts.number("total"), counts.number("activated")
        found = Parameters(int(total or 0), int(activated or 0), "whole model, by its manifest")
        return found, ["activated parameters are those of its manifest: of the whole model, not the language model"]
    return None, ["activated parameters are not known: its manifest has neither a whole model config nor counts"]


def _from_manifest(manifest: Fields) -> config_lib.ModelConfig | None:
    fields = {k: v for k, v in manifest.mapping("config", optional=True).items() if k.startswith("model.")}
    known = {name for name in validation.flatten(config_lib.RunConfig()) if name.startswith("model.")}
    return checkpoint.config_of(fields).model if fields and set(fields) == known else None


def _from_checkpoint(manifest: Fields) -> config_lib.ModelConfig | None:
    """Returns the config beside the checkpoint, if what lies there now has as many parameters as the manifest says."""
    if not (manifest.values.get("checkpoint") and manifest.values.get("parameters")):
        return None
    source = manifest.section("checkpoint")
    path, kind = source.text("path"), source.text("kind", optional=True)
    try:
        model = checkpoint.read_config(path).model if kind == "workdir" else configs.read(path).config
    except (ValueError, OSError):  # moved, deleted, or with settings that only the evaluation knew
        return None
    total = size.count_parameters(model)["model"].total
    return model if total == manifest.section("parameters").number("total") else None


@functools.lru_cache(maxsize=32)
def _count(model: config_lib.ModelConfig) -> Parameters:
    counts = size.count_parameters(model)["decoder"]
    return Parameters(counts.total, counts.activated, LANGUAGE_MODEL)
