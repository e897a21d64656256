"""Tiny models with random adapters, and their logits here and in torch, for the tests of adapters."""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import adapter_readers, adapters, configs, load
from moe_vlm_jax.models import adapters as targets
from moe_vlm_jax.models import vlm
from tests.models import hf_parity_test as parity

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 13))
FINGERPRINT = "0123456789abcdef"


def lora_config(**changes) -> config_lib.LoraConfig:
    settings = {"rank": 5, "alpha": 7.0, "dropout": 0.15, "init": "gaussian", "targets": targets.ALL_LINEAR}
    return config_lib.LoraConfig(**{**settings, **changes})


def model_config(
    folder: pathlib.Path, lora: config_lib.LoraConfig
) -> tuple[config_lib.ModelConfig, configs.Checkpoint]:
    info = configs.read(folder)
    vision = info.config.vision if info.layout == "llava" else parity.NO_VISION
    return dataclasses.replace(info.config, compute_dtype="float32", vision=vision, lora=lora), info


def build(folder: pathlib.Path, config: config_lib.ModelConfig, leaves: dict[str, np.ndarray] | None = None):
    """Returns (graphdef, params): a checkpoint with adapters, given or random; what is not in the checkpoint is 0."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    base, factors = targets.split(abstract)
    held = set(configs.read(folder).sections)
    wanted = nnx.from_flat_state([(path, v) for path, v in nnx.to_flat_state(base) if path[0] in held])
    loaded = {path: v.get_value() for path, v in tree.leaves(load.load_into(wanted, folder, config).state).items()}
    rng = np.random.default_rng(3)
    draw = {path: 0.3 * rng.normal(size=v.get_value().shape) for path, v in tree.leaves(factors).items()}
    filled = {**loaded, **draw, **(leaves or {})}
    pairs = nnx.to_flat_state(abstract)
    values = {path: filled.get("/".join(map(str, path)), np.zeros(v.get_value().shape)) for path, v in pairs}
    return graphdef, nnx.from_flat_state(
        [(path, v.replace(jnp.asarray(values[path], jnp.float32))) for path, v in pairs]
    )


def logits(graphdef: nnx.GraphDef, params: nnx.State) -> np.ndarray:
    return np.asarray(parity.run(nnx.merge(graphdef, params), parity.text_batch(TOKENS))[2])


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def trained(params: nnx.State, *also: str) -> dict[str, np.ndarray]:
    """Returns the leaves of the adapters, and of what else is named by a pattern."""
    pattern = "|".join([targets.PATHS, *also])
    return {p: np.asarray(v.get_value()) for p, v in tree.leaves(params).items() if re.fullmatch(pattern, p)}


def write(folder, params, config, info, *also: str, **changes):
    settings = {"layout": info.layout, "base": info, "source": "the/base", "fingerprint": FINGERPRINT}
    return adapters.write_adapter(folder, trained(params, *also), config, **{**settings, **changes})


def read(folder, base: pathlib.Path, fingerprint: str = FINGERPRINT):
    """Returns the config with the folder's settings, and the adapter."""
    config, info = model_config(base, config_lib.LoraConfig())
    where = {"layout": info.layout, "base": info}
    config = dataclasses.replace(config, lora=adapter_readers.read_config(folder, config, **where))
    return config, adapter_readers.load_adapter(folder, config, base_fingerprint=fingerprint, **where)


def of_peft(folder: pathlib.Path, model, **settings):
    """Returns PEFT's model with random factors, saved into the folder."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model
