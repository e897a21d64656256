"""Rules between the fields of a config that say where experts are and which tokens reach them."""

import dataclasses
import functools
from collections.abc import Iterator

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import limits


def experts(model: config_lib.ModelConfig) -> Iterator[str]:
    """Yields the mistakes in model.moe."""
    moe, num_layers = model.moe, model.decoder.num_layers
    if moe.placement not in config_lib.PLACEMENTS:
        return
    if any(layer >= num_layers for layer in moe.layers) or len(set(moe.layers)) != len(moe.layers):
        yield (
            f"model.moe.layers={moe.layers!r} must be different layers below model.decoder.num_layers={num_layers}; "
            "correct it."
        )
        return
    num_moe = sum(config_lib.layer_experts(dataclasses.replace(moe, num_experts=(1,)), num_layers))
    if len(moe.num_experts) not in {1, num_moe}:
        yield (
            f"model.moe.num_experts={moe.num_experts!r} has {len(moe.num_experts)} entries for {num_moe} MoE layers; "
            f"give one for all of them, or {num_moe}."
        )
    elif moe.top_k > min(moe.num_experts):
        yield (
            f"model.moe.top_k={moe.top_k} is more than num_experts={min(moe.num_experts)}, and a token's choices are "
            "different experts; lower top_k or raise num_experts."
        )
    idle = functools.partial(limits.no_effect, moe, "model.moe")
    if moe.layers:
        yield from idle("placement", "beside model.moe.layers")
    if moe.dispatch != "capacity":
        slots = "capacity_factor eval_capacity_factor min_capacity capacity_group random_token_selection"
        yield from idle(slots, f"with dispatch={moe.dispatch!r} (only 'capacity' has slots)")
    elif moe.random_token_selection and moe.top_k > 1:
        yield f"model.moe.random_token_selection=True needs top_k=1, not {moe.top_k}; turn it off."
    if moe.dispatch != "dropless":
        yield from idle("grouped_matmul block_rows", f"with dispatch={moe.dispatch!r} (only 'dropless' groups)")
    elif moe.grouped_matmul == "ragged":
        yield from idle("block_rows", "with grouped_matmul='ragged'")
    yield from _modalities(moe)
    yield from _clusters(moe)
    if moe.top_k == 1:
        yield from idle("renormalize gumbel_second_choice", "with top_k=1 (there is no second choice)")


def _modalities(moe: config_lib.MoEConfig) -> Iterator[str]:
    if moe.router != "modality":
        yield from limits.no_effect(moe, "model.moe", "text_experts image_experts", f"with router={moe.router!r}")
        return
    if len(set(moe.num_experts)) > 1:
        yield (
            f"model.moe.num_experts={moe.num_experts!r} differs between layers, but router='modality' has one set of "
            "experts for text and one for images; use one number."
        )
        return
    num_experts = moe.num_experts[0]
    held = {"text_experts": moe.text_experts, "image_experts": moe.image_experts}
    for name, experts in held.items():
        if len(set(experts)) != len(experts) or any(not 0 <= expert < num_experts for expert in experts):
            yield f"model.moe.{name}={experts!r} must be different experts from 0 to {num_experts - 1}; correct it."
        elif not experts:
            yield f"model.moe.{name}=() leaves these tokens without an expert; name at least one."
        elif moe.top_k > len(experts):
            yield (
                f"model.moe.top_k={moe.top_k} is more than the {len(experts)} of model.moe.{name}={experts!r}, and a "
                "token's choices are different experts; lower top_k or name more."
            )
    if missing := sorted(set(range(num_experts)).difference(*held.values())):
        yield (
            f"experts {missing} are in neither model.moe.text_experts nor model.moe.image_experts and would never be "
            "chosen; name them or lower num_experts."
        )


def _clusters(moe: config_lib.MoEConfig) -> Iterator[str]:
    if moe.router != "cluster":
        yield from limits.no_effect(moe, "model.moe", "clusters", f"with router={moe.router!r}")
    elif not moe.clusters:
        yield (
            "model.moe.clusters is empty, but router='cluster' goes by clusters of questions; make a file of them with "
            "python -m moe_vlm_jax.cluster_questions, and name it."
        )
    elif moe.gumbel_second_choice or moe.random_token_selection:
        yield "model.moe.router='cluster' has no noise; set gumbel_second_choice and random_token_selection to False."


def shared_questions(config: config_lib.RunConfig) -> Iterator[str]:
    """Yields that questions would share a beginning whose experts each of them wants to choose."""
    if config.model.routes_by_question and config.data.share_prefix and config.preference.loss == "none":
        yield (
            "data.share_prefix=True lets questions about an image share its tokens, but model.moe.router='cluster' "
            "routes these by the question; set it to False."
        )


def stgc(config: config_lib.RunConfig) -> Iterator[str]:
    """Yields the mistakes in training.stgc."""
    settings, layers = config.training.stgc, config.training.stgc.layers
    idle = functools.partial(limits.no_effect, settings, "training.stgc")
    if not settings.coefficient:
        yield from idle("threshold layers gradient alone", "with training.stgc.coefficient=0.0")
        return
    if config.model.moe.placement == "none" and not config.model.moe.layers:
        yield from idle("coefficient", "in a model without experts")
    if config.preference.loss != "none":
        yield from idle(
            "coefficient", f"with preference.loss={config.preference.loss!r} (it is for instruction tuning)"
        )
    if layers and (len(layers) != 2 or not layers[0] < layers[1] <= config.model.decoder.num_layers):
        yield (
            f"training.stgc.layers={layers!r} must be (first, end) with first below end and end at most "
            f"model.decoder.num_layers={config.model.decoder.num_layers}; correct it or leave it empty for all."
        )
    if config.model.moe.router != "topk":
        yield (
            f"training.stgc.coefficient={settings.coefficient} needs model.moe.router='topk', not "
            f"{config.model.moe.router!r}: a token whose experts are given cannot be sent to others; set it to 0."
        )
    if settings.alone and settings.gradient != "full":
        yield f"training.stgc.alone=True needs gradient='full', not {settings.gradient!r}; set that, or alone to False."
