"""PEFT's folder of a LoRA: its config, the names of its tensors, and how it lays out the factors of stacked experts.

    adapter_config.json          r, lora_alpha, which modules and parameters, ...
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [R, in], ....lora_B.weight [out, R]

A stacked parameter [E, out, in] (`target_parameters`) has lora_A [E*R, in], expert by expert, and lora_B [out, R*E],
rank by rank: column r * E + e is expert e's. Several such parameters of one module wrap each other, the first
innermost: with `gate_up_proj` and `down_proj` adapted, the tensors of the former are at `experts.base_layer`, those of
the latter at `experts`. Up to PEFT 0.19.0 `in` and `out` were exchanged there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_vlm_jax import config as config_lib

VERSION = "0.21.2"  # whose layout is written
PREFIX = "base_model.model."
_STACKED_SINCE = (0, 19, 1)

# Fields that change what an adapter computes, and the values with which it is a plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "arrow_config": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "ensure_weight_tying": (False,),
}
# Where the factors start, or how the file is read: nothing that a trained adapter computes. (PiSSA, OLoRA and their
# like change the base's weights, which shows in `init_lora_weights`.)
_INERT = """
auto_mapping base_model_name_or_path revision task_type inference_mode peft_version loftq_config corda_config eva_config
lora_ga_config megatron_core qalora_group_size runtime_config layers_pattern
"""
_READ = """
r lora_alpha lora_dropout use_rslora init_lora_weights target_modules target_parameters exclude_modules
layers_to_transform rank_pattern alpha_pattern modules_to_save
"""
_KNOWN = frozenset(_PLAIN) | frozenset(_INERT.split()) | frozenset(_READ.split())
_INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming"}


def config_json(
    lora: config_lib.LoraConfig,
    *,
    modules: Sequence[str],
    parameters: Sequence[str],
    saved: Sequence[str],
    ranks: Mapping[str, int],
    base: str,
    causal: bool,
) -> dict[str, Any]:
    """Returns adapter_config.json.

    Args:
      lora: rank, alpha, ...; PEFT has no dropout beside stacked parameters, so it is 0 where there are any.
      modules, parameters: full names of what is adapted.
      saved: full names of modules that the folder holds whole.
      ranks: {name: rank} of what has another rank than lora.rank; it is scaled like the rest.
      base: name of the base model.
      causal: whether the base is a causal language model.
    """

    def same_scale(rank: int) -> float:
        factor = rank / lora.rank
        return lora.alpha * (math.sqrt(factor) if lora.rslora else factor)

    return {
        "peft_type": "LORA",
        "peft_version": VERSION,
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": "gaussian" if lora.init == "gaussian" else True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {re.escape(name): same_scale(rank) for name, rank in ranks.items()},
    }


def unsupported(raw: Mapping[str, Any]) -> list[str]:
    """Returns what an adapter_config.json asks for that is no plain LoRA, one mistake a line."""
    mistakes = [
        f"{name}={raw[name]!r} is not implemented, only {plain[0]!r}; save an adapter without it."
        for name, plain in _PLAIN.items()
        if name in raw and raw[name] not in plain
    ]
    if raw.get("init_lora_weights", True) not in _INITS:
        mistakes.append(
            f"init_lora_weights={raw['init_lora_weights']!r} changes the base's weights; convert the adapter with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for name in sorted(set(raw) - _KNOWN):
        if raw[name] not in (None, False, [], {}, ""):
            mistakes.append(f"field {name}={raw[name]!r} is unknown; save an adapter without it.")
    if raw.get("target_parameters") and _version(raw) < _STACKED_SINCE:
        mistakes.append(
            f"target_parameters={raw['target_parameters']!r} with peft_version={raw.get('peft_version')!r}: before "
            f"PEFT {'.'.join(map(str, _STACKED_SINCE))} stacked experts had the factors' in and out exchanged; "
            "train it with a newer PEFT."
        )
    return mistakes


def lora_config(raw: Mapping[str, Any]) -> config_lib.LoraConfig:
    """Returns our settings of a supported adapter_config.json, without targets."""
    return config_lib.LoraConfig(
        rank=raw["r"],
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout", 0.0),
        rslora=raw.get("use_rslora", False),
        init=_INITS[raw.get("init_lora_weights", True)],
    )


def rank_and_alpha(raw: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Returns rank and alpha of one module or parameter: the first pattern that matches wins, as in PEFT."""

    def pick(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        return next(found, default)

    return pick(raw.get("rank_pattern"), raw["r"]), pick(raw.get("alpha_pattern"), raw.get("lora_alpha", 8))


def targets_module(raw: Mapping[str, Any], name: str) -> bool:
    """Returns whether PEFT adapts a module of this full name."""
    targets, excluded, layers = raw.get("target_modules"), raw.get("exclude_modules"), raw.get("layers_to_transform")
    if not targets or _matches(excluded, name) or not _matches(targets, name):
        return False
    number = re.search(r"\.(\d+)\.", name)
    return layers is None or (
        number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)
    )


def targets_parameter(raw: Mapping[str, Any], name: str) -> bool:
    """Returns whether PEFT adapts a parameter of this full name."""
    return any(name == target or name.endswith(f".{target}") for target in raw.get("target_parameters") or ())


def module_of(tensor: str) -> str:
    """Returns the module that holds a tensor: 'a.q_proj' of 'a.q_proj.weight', 'a.experts' of 'a.experts.down_proj'."""
    return tensor.rpartition(".")[0]


def is_stacked(tensor: str) -> bool:
    """Returns whether a kernel's tensor is a bare parameter and not the weight of a linear layer."""
    return not tensor.endswith(".weight")


def key_stems(tensors: Sequence[str]) -> dict[str, str]:
    """Returns {tensor: what stands before '.lora_A.weight'} of all tensors that an adapter adapts.

    Args:
      tensors: in the order in which their modules define them.
    """
    later: dict[str, int] = {}
    stems = {}
    for tensor in reversed(tensors):
        module = module_of(tensor)
        depth = later.get(module, 0) if is_stacked(tensor) else 0
        later[module] = depth + 1
        stems[tensor] = PREFIX + module + ".base_layer" * depth
    return stems


def flatten(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns PEFT's (lora_A, lora_B) of a pair of ours.

    Args:
      a: [in, R] -> [R, in], or [E, in, R] -> [E*R, in].
      b: [R, out] -> [out, R], or [E, R, out] -> [out, R*E].
    """
    if a.ndim == 2:
        return a.T, b.T
    num_experts, in_dim, rank = a.shape
    return a.transpose(0, 2, 1).reshape(-1, in_dim), b.transpose(2, 1, 0).reshape(-1, rank * num_experts)


def unflatten(a: np.ndarray, b: np.ndarray, num_experts: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns ours of PEFT's pair: undoes `flatten`; num_experts is None for a linear layer."""
    if num_experts is None:
        return a.T, b.T
    split_a = a.reshape(num_experts, -1, a.shape[-1])  # [E, R, in]
    split_b = b.reshape(b.shape[0], -1, num_experts)  # [out, R, E]
    return split_a.transpose(0, 2, 1), split_b.transpose(2, 1, 0)


def _matches(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _version(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the version that wrote a config; before 0.18 it was not written down."""
    return tuple(int(part) for part in re.findall(r"\d+", str(raw.get("peft_version") or "0").partition("@")[0])[:3])
