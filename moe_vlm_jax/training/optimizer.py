"""Schedules and optimizers, from optax, over the trainable part only."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_vlm_jax import config as config_lib

# The update's root mean square under Muon, chosen to be that of Adam (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_MUON_CONSISTENT_RMS = 0.2


class Optimizer(NamedTuple):
    """Attributes: transform; schedule: step -> learning rate of the (AdamW) update at that step, for the metrics."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimizer(config: config_lib.OptimizerConfig, num_steps: int) -> Optimizer:
    """Returns the optimizer of a run of num_steps steps; gradients are clipped by their global norm first."""
    schedule = make_schedule(config, config.learning_rate, num_steps)
    mask = functools.partial(decay_mask, excluded=config.no_decay)
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=mask,
        mu_dtype=config.moments_dtype,
    )
    if config.name == "adamw":
        update = adamw
    elif config.name == "muon":
        muon = optax.contrib.muon(
            make_schedule(config, config.muon_learning_rate, num_steps),
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            consistent_rms=_MUON_CONSISTENT_RMS,
            muon_weight_dimension_numbers=_last_two_axes,
        )
        update = optax.partition({"muon": muon, "adamw": adamw}, muon_labels)
    else:
        raise ValueError(f"optimizer.name={config.name!r} is unknown; use 'adamw' or 'muon'.")
    steps = [optax.clip_by_global_norm(config.max_grad_norm), update]
    if config.rates:
        steps.append(scale_by_path(parse_rates(config.rates)))
    return Optimizer(optax.chain(*steps), schedule)


def check_groups(config: config_lib.OptimizerConfig, paths: Sequence[str]) -> None:
    """Checks that the patterns of `rates` and `no_decay` name trainable parameters, each at most one rate.

    Raises:
      ValueError: all mistakes in one message.
    """
    rates = parse_rates(config.rates)
    mistakes = [
        f"optimizer.{field} pattern {pattern!r} names no trainable parameter; correct or remove it."
        for field, patterns in (("rates", rates), ("no_decay", config.no_decay))
        for pattern in patterns
        if not any(re.fullmatch(pattern, path) for path in paths)
    ]
    for path in paths:
        named = [pattern for pattern in rates if re.fullmatch(pattern, path)]
        if len(named) > 1:
            mistakes.append(
                f"optimizer.rates patterns {' and '.join(map(repr, named))} both name {path!r}; make them disjoint."
            )
            break
    if mistakes:
        raise ValueError("\n".join(mistakes))


def parse_rates(rates: Sequence[str]) -> dict[str, float]:
    """Returns {pattern: factor} of entries 'PATTERN=FACTOR'.

    >>> parse_rates((".*/lora_b=16",))
    {'.*/lora_b': 16.0}
    """
    found = {}
    for entry in rates:
        pattern, _, factor = entry.rpartition("=")
        try:
            found[pattern] = float(factor)
        except ValueError:
            found[pattern] = math.nan
        if not pattern or not found[pattern] >= 0:
            raise ValueError(
                f"optimizer.rates entry {entry!r} must be PATTERN=FACTOR with a factor of at least 0; write it like "
                "'.*/lora_b=16'."
            )
    return found


def scale_by_path(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Returns a transformation that multiplies updates, decay included, by the factor of their parameter's path."""

    def factor(path: jax.tree_util.KeyPath) -> float:
        return next((rate for pattern, rate in rates.items() if re.fullmatch(pattern, leaf_path(path))), 1.0)

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(lambda path, update: update * factor(path), updates)
    )


def make_schedule(config: config_lib.OptimizerConfig, peak: float, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate, as HF's get_cosine_schedule_with_warmup (half a cosine, warm-up from zero).

    With W = ceil(warmup_ratio * num_steps), HF Trainer's rounding, steps 0 .. W-1 rise linearly from 0 to the peak
    and the rest falls along the cosine to final_ratio * peak. So the first update of a run with warm-up has rate 0:

        6 steps, warmup_ratio 1/6, peak 1:   0.0  1.0  0.905  0.655  0.345  0.095

    Args:
      config: schedule, warmup_ratio and final_ratio.
      peak: highest learning rate.
      num_steps: steps of the whole run.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step).astype(jnp.float32)
        rising = step / max(1, warmup)
        if config.schedule == "constant":
            falling = jnp.ones((), jnp.float32)
        else:
            progress = jnp.clip((step - warmup) / max(1, num_steps - warmup), 0.0, 1.0)
            falling = config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(step < warmup, rising, falling)

    return schedule


def decay_mask(params: nnx.State, *, excluded: Sequence[str] = ()) -> nnx.State:
    """Returns True where weight decay applies: matrices, but not biases, norms, embeddings or class tokens.

    Args:
      params: the trainable part.
      excluded: patterns over paths of matrices that do not decay either.
    """
    matrices = ("/kernel", "/lora_a", "/lora_b")

    def decays(path: jax.tree_util.KeyPath, _) -> bool:
        name = leaf_path(path)
        return name.endswith(matrices) and not any(re.fullmatch(pattern, name) for pattern in excluded)

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_labels(params: nnx.State) -> nnx.State:
    """Returns 'muon' for the matrices inside blocks and the projector, 'adamw' for everything else.

    Embeddings and the head are matrices, but their rows are separate words, not a map between spaces; the router's
    columns are separate experts and its gradient is tiny for experts that few tokens choose, which orthogonalising
    would blow up.
    """

    def label(path, _) -> str:
        name = leaf_path(path)
        matrix = name.endswith("/kernel") and ("/blocks/" in name or name.startswith("projector/"))
        return "muon" if matrix and "/router/" not in name and "/coefficient/" not in name else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def leaf_path(path: jax.tree_util.KeyPath) -> str:
    """Returns the parameter path of a JAX key path: its keys joined by '/', without the variable's own field."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _last_two_axes(params: Any) -> Any:
    """Kernels are [..., in, out]: stacked layers and experts are separate matrices."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)
