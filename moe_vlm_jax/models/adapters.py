"""Which linear layers of a model get a LoRA, and the usual choices by name."""

import re

import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.moe import router as router_lib
from moe_vlm_jax.nn import linear
from moe_vlm_jax.nn import lora as lora_lib

# Patterns for LoraConfig.targets: attention's q, k, v as LoRA's authors tried them; every expert of every MoE layer;
# every linear layer of the language model's blocks, as QLoRA's authors advise.
QKV = (r"decoder/groups/.*/attention/(q|k|v)",)
EXPERTS = (r"decoder/groups/.*/moe/experts/(up|gate|down)",)
ALL_LINEAR = (r"decoder/groups/.*/(q|k|v|o|up|gate|down)",)

PATHS = r".*/lora_[ab]"  # pattern of all adapter leaves


def attach(model: nnx.Module, config: config_lib.LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Puts a pair of factors beside the kernel of every target layer; nothing when config.rank is 0.

    The factors have the leading axes of the kernel: layers that are stacked, and experts.

    Args:
      model: whose layers are looked at, by their paths.
      config: rank, initialisation and patterns.
      rngs: source of 'params' keys.

    Raises:
      ValueError: a pattern that names no linear layer, or that names a router; all mistakes in one message.
    """
    if config.rank == 0:
        return
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_graph(model)}
    linears = {p: m for p, m in modules.items() if isinstance(m, linear.Linear | linear.ExpertLinear)}
    routers = [p for p, m in modules.items() if isinstance(m, router_lib.TopKRouter)]
    mistakes = []
    chosen: dict[str, linear.Linear | linear.ExpertLinear] = {}
    for pattern in config.targets:
        named = {p: m for p, m in linears.items() if re.fullmatch(pattern, p)}
        hit = [p for p in (*routers, *(p for p in linears if p.endswith("/coefficient"))) if re.fullmatch(pattern, p)]
        if hit:
            mistakes.append(
                f"lora.targets pattern {pattern!r} names {hit[0]!r}: a router is small and trains in full; narrow the "
                "pattern and name the router in training.trainable."
            )
        elif not named:
            mistakes.append(
                f"lora.targets pattern {pattern!r} names no linear layer; layers are called like "
                f"{', '.join(sorted(linears)[:4])}."
            )
        chosen |= named
    if mistakes:
        raise ValueError("\n".join(mistakes))
    for path in sorted(chosen):
        _attach(chosen[path], config, rngs)


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns (everything else, the adapters) of a model's parameters; `nnx.merge_state` puts them together."""
    parts = ([], [])
    for path, variable in nnx.to_flat_state(params):
        parts[re.fullmatch(PATHS, "/".join(map(str, path))) is not None].append((path, variable))
    return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])


def scale(config: config_lib.LoraConfig) -> float:
    """Returns what A B is multiplied by; 0 where there are no adapters."""
    return lora_lib.scaling(config).scale if config.rank else 0.0


def _attach(layer: linear.Linear | linear.ExpertLinear, config: config_lib.LoraConfig, rngs: nnx.Rngs) -> None:
    *leading, in_dim, out_dim = layer.kernel.get_value().shape
    dtype = layer.kernel.get_value().dtype
    a = lora_lib.initial_a(rngs.params(), (*leading, in_dim, config.rank), config.init)
    layer.lora_a = nnx.LoRAParam(a.astype(dtype))
    layer.lora_b = nnx.LoRAParam(jnp.zeros((*leading, config.rank, out_dim), dtype))
    layer.lora = lora_lib.scaling(config)
