"""Activated parameters of an evaluated model, counted on the shapes that its config gives."""

import dataclasses
import functools

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation
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
    """Returns the parameters of a manifest, and what a reader has to know of them.

    The config counts where it gives a whole model; else the manifest's own figures do.
    """
    fields = {k: v for k, v in manifest.mapping("config", optional=True).items() if k.startswith("model.")}
    known = {name for name in validation.flatten(config_lib.RunConfig()) if name.startswith("model.")}
    if fields and set(fields) == known:
        return of_config(checkpoint.config_of(fields).model), []
    if manifest.values.get("parameters"):
        counts = manifest.section("parameters")
        total, activated = counts.number("total"), counts.number("activated")
        return Parameters(int(total or 0), int(activated or 0), "as its manifest counts them"), []
    return None, ["activated parameters are not known: its manifest has neither a whole model config nor counts"]


@functools.lru_cache(maxsize=32)
def _count(model: config_lib.ModelConfig) -> Parameters:
    counts = size.count_parameters(model)["decoder"]
    return Parameters(counts.total, counts.activated, LANGUAGE_MODEL)
