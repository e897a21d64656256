"""All rules of a config, checked at once, before anything is allocated or compiled."""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import expert_rules, limits


def validate(config: config_lib.RunConfig) -> None:
    """Checks every rule that needs nothing but the config.

    Raises:
      ValueError: all mistakes, one line each: value, rule, remedy.
    """
    mistakes = list(type_mistakes(config))
    if not mistakes:  # the other rules compute with the values
        mistakes = [*_ranges(config), *_patterns(config), *_model(config.model), *expert_rules.experts(config.model)]
        mistakes += [*_adaptation(config.model), *_data(config), *_training(config), *expert_rules.stgc(config)]
        mistakes += [*_preference(config), *expert_rules.shared_questions(config)]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """Returns {'model.moe.top_k': 2, ...}: the leaf fields of nested dataclasses by dotted path."""
    flat: dict[str, object] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def unknown_field(path: str, config: object) -> str:
    """Returns the message for a dotted path that is no field of the config: the nearest names, or its section's."""
    known = list(flatten(config))
    section, _, leaf = path.rpartition(".")
    siblings = [name.removeprefix(section + ".") for name in known if name.rpartition(".")[0] == section]
    near = [name for name in known if name.rpartition(".")[2] == leaf]
    near = near or [f"{section}.{name}" for name in difflib.get_close_matches(leaf, siblings, n=2, cutoff=0.7)]
    near = near or difflib.get_close_matches(path, known, n=2, cutoff=0.8) * (not siblings)
    if near:
        remedy = f"did you mean {' or '.join(near)}?"
    elif siblings:
        remedy = f"{section} has {', '.join(siblings)}."
    else:
        remedy = "docs/configs.md lists all fields."
    return f"config field {path!r} does not exist; {remedy}"


def indivisible_experts(num_experts: int, axis_size: int) -> str:
    """Returns the message for experts that the mesh's expert axis does not divide."""
    divisors = [str(n) for n in range(1, num_experts + 1) if num_experts % n == 0]
    fitting = " or ".join([", ".join(divisors[:-1]), divisors[-1]] if len(divisors) > 1 else divisors)
    return (
        f"num_experts={num_experts} is not divisible by the 'expert' mesh axis of size {axis_size}; use a multiple of "
        f"{axis_size} or set mesh.expert to {fitting}."
    )


def type_mistakes(config: object, prefix: str = "") -> Iterator[str]:
    """Yields a message for each field of nested dataclasses whose value is not of its type."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, path = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(field.type):
            if isinstance(value, field.type):  # type: ignore[arg-type]
                yield from type_mistakes(value, path + ".")
            else:
                yield f"{path}={value!r} must be a {field.type.__name__}; set its fields one by one."  # type: ignore[union-attr]
        elif isinstance(field.type, types.GenericAlias):
            element = typing.get_args(field.type)[0]
            if not isinstance(value, tuple) or not all(_is(item, element) for item in value):
                example = "(256, 512)" if element is int else "('a', 'b')"
                yield f'{path}={value!r} must be a tuple of {element.__name__}; write it like "{example}".'
        elif not _is(value, field.type):  # type: ignore[arg-type]
            yield f"{path}={value!r} must be of type {field.type.__name__}; give such a value."  # type: ignore[union-attr]


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _ranges(config: config_lib.RunConfig) -> Iterator[str]:
    flat = flatten(config)
    for path, choices in limits.CHOICES.items():
        if flat[path] not in choices:
            near = difflib.get_close_matches(str(flat[path]), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{path}={flat[path]!r} is unknown; use one of {', '.join(map(repr, choices))}{hint}"
    for (low, high, inclusive), sections in limits.RANGES.items():
        bounds = f"{'at least' if inclusive else 'more than'} {low}" + ("" if high is None else f", at most {high}")
        for path in (f"{section}.{name}" for section, names in sections.items() for name in names.split()):
            value = flat[path]
            for item in value if isinstance(value, tuple) else (value,):
                number = typing.cast(float, item)
                below = low is not None and (number < low or (number == low and not inclusive))
                if below or (high is not None and number > high) or math.isnan(number):
                    yield f"{path}={value!r} is out of range; it must be {bounds}."


def _model(model: config_lib.ModelConfig) -> Iterator[str]:
    vision, decoder = model.vision, model.decoder
    if vision.image_size % vision.patch_size and not _drops_border(vision):
        fitting = max(1, vision.image_size // vision.patch_size) * vision.patch_size
        yield (
            f"model.vision.image_size={vision.image_size} is not divisible by model.vision.patch_size="
            f"{vision.patch_size}; use {fitting}."
        )
    if vision.embed_dim % vision.num_heads:
        yield (
            f"model.vision.embed_dim={vision.embed_dim} is not divisible by model.vision.num_heads={vision.num_heads}; "
            "change one of them."
        )
    if vision.num_tokens < 1:
        tokens = vision.num_tokens + vision.skip_tokens
        yield f"model.vision.skip_tokens={vision.skip_tokens} leaves none of {tokens} tokens; use less than {tokens}."
    low, high = -vision.num_layers - 1, vision.num_layers
    if not low <= vision.select_layer <= high:
        yield (
            f"model.vision.select_layer={vision.select_layer} is no hidden state of {vision.num_layers} layers; "
            f"use {low} to {high}."
        )
    if decoder.num_heads % decoder.num_kv_heads:
        yield (
            f"model.decoder.num_heads={decoder.num_heads} is not divisible by model.decoder.num_kv_heads="
            f"{decoder.num_kv_heads}; use a divisor of num_heads."
        )
    if decoder.rotary_dim % 2 or decoder.rotary_dim > decoder.head_dim:
        yield (
            f"model.decoder.rotary_dim={decoder.rotary_dim} must be even and at most head_dim={decoder.head_dim}; "
            "change it."
        )
    if decoder.tie_embeddings and decoder.lm_head_bias:
        yield "model.decoder.lm_head_bias=True has no effect with tie_embeddings=True; set one of them to False."
    if model.projector not in ("identity", "linear") and not re.fullmatch(r"mlp[1-9]\d*x_gelu", model.projector):
        yield f"model.projector={model.projector!r} is unknown; use 'linear', 'identity' or 'mlpNx_gelu' with N from 1."
    if model.projector == "identity" and vision.embed_dim != decoder.embed_dim:
        yield (
            f"model.projector='identity' needs model.vision.embed_dim={vision.embed_dim} to equal "
            f"model.decoder.embed_dim={decoder.embed_dim}; use 'linear'."
        )


def _drops_border(vision: config_lib.VisionConfig) -> bool:
    """SigLIP so400m reads 384 pixels with patches of 14: its convolution leaves out the last 6, by design."""
    return (vision.image_size, vision.patch_size, vision.class_token) == (384, 14, False)


def _adaptation(model: config_lib.ModelConfig) -> Iterator[str]:
    quant, lora = model.quant, model.lora
    if quant.kind == "none":
        yield from limits.no_effect(quant, "model.quant", "block double targets", "with model.quant.kind='none'")
    elif not quant.targets:
        yield f"model.quant.kind={quant.kind!r} quantises nothing with model.quant.targets=(); name a pattern."
    elif quant.kind != "int8" and quant.block % 2:
        yield f"model.quant.block={quant.block} must be even for {quant.kind!r}: two codes share a byte; use 64."
    if lora.rank == 0:
        yield from limits.no_effect(lora, "model.lora", "alpha dropout rslora init targets", "with model.lora.rank=0")
    elif not lora.targets:
        yield f"model.lora.rank={lora.rank} adapts nothing with model.lora.targets=(); name a pattern, or set rank=0."


def _patterns(config: config_lib.RunConfig) -> Iterator[str]:
    """Yields fields of patterns that are no regular expressions."""
    names = ("model.quant.targets", "model.lora.targets", "training.trainable", "training.frozen", "optimizer.no_decay")
    flat = flatten(config)
    for name in (*names, "optimizer.rates"):
        for pattern in typing.cast(tuple[str, ...], flat[name]):
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{name} has {pattern!r}, which is no regular expression ({error}); correct it."


def _data(config: config_lib.RunConfig) -> Iterator[str]:
    data, max_positions = config.data, config.model.decoder.max_positions
    if not data.row_lengths or list(data.row_lengths) != sorted(set(data.row_lengths)):
        yield f"data.row_lengths={data.row_lengths!r} must be different lengths in rising order; correct it."
    elif max(data.row_lengths) > max_positions:
        yield (
            f"data.row_lengths={data.row_lengths!r} goes beyond model.decoder.max_positions={max_positions}; shorten "
            "the rows or raise max_positions."
        )
    if data.source in ("llava", "infographicvqa") and not data.path:
        yield f"data.path is empty but data.source={data.source!r} reads files; set data.path."
    idle = functools.partial(limits.no_effect, data, "data")
    by_source = f"with data.source={data.source!r}"
    if data.source in ("embedded", "easy_vqa"):
        yield from idle("path", by_source)
    if data.source != "llava":
        yield from idle("image_folder", by_source)
    else:
        yield from idle("answer_types", by_source)
    if data.source != "embedded":
        yield from idle("difficulty num_images wordy_share", by_source)
    if not data.share_prefix:
        yield from idle("max_branches", "with data.share_prefix=False")


def _training(config: config_lib.RunConfig) -> Iterator[str]:
    training, mesh = config.training, config.mesh
    if not training.trainable:
        yield "training.trainable=() trains nothing; name at least one pattern."
    if not config.data.eval_split:
        fields = "max_questions every_steps batch_size controls page_samples"
        yield from limits.no_effect(config.evaluation, "evaluation", fields, "with data.eval_split=''")
    if not training.base:
        names = "base_vision base_projector adapter upcycling_noise"
        yield from limits.no_effect(training, "training", names, "without training.base")
    elif training.base.startswith("@"):
        yield (
            f"training.base={training.base!r} names a run of a chain, but this run is none of a chain; give the folder "
            "of a checkpoint."
        )
    if config.model.moe.placement == "none" and not config.model.moe.layers:
        yield from limits.no_effect(
            training, "training", "upcycling_noise routing_images_every", "in a model without experts"
        )
    if training.adapter and config.model.lora.rank == 0:
        yield f"training.adapter={training.adapter!r} has no place with model.lora.rank=0; set model.lora as there."
    if config.optimizer.name != "muon":
        yield from limits.no_effect(
            config.optimizer, "optimizer", "muon_learning_rate", "without optimizer.name='muon'"
        )
    if config.optimizer.schedule == "constant":
        yield from limits.no_effect(config.optimizer, "optimizer", "final_ratio", "with optimizer.schedule='constant'")
    if config.generation.temperature == 0:
        yield from limits.no_effect(
            config.generation, "generation", "top_p top_k", "with generation.temperature=0 (greedy)"
        )
    row_devices = max(mesh.data, 1) * mesh.fsdp * mesh.expert
    if training.batch_size % row_devices:
        yield (
            f"training.batch_size={training.batch_size} is not divisible by the {row_devices} devices of the mesh axes "
            f"data, fsdp and expert; use a multiple of {row_devices}."
        )
    for num_experts in sorted(set(config.model.moe.num_experts)):
        if num_experts % mesh.expert:
            yield indivisible_experts(num_experts, mesh.expert)


def _preference(config: config_lib.RunConfig) -> Iterator[str]:
    preference, model = config.preference, config.model
    idle = functools.partial(limits.no_effect, preference, "preference")
    if preference.loss == "none":
        fields = "beta label_smoothing gamma sft_coef reference precomputed pairs held_out num_pairs temperature top_p"
        yield from idle(fields, "with preference.loss='none'")
        return
    by_loss = f"with preference.loss={preference.loss!r}"
    if not preference.pairs:
        yield f"preference.pairs is empty, but preference.loss={preference.loss!r} trains on pairs; name their file."
    elif preference.pairs.startswith("@"):
        yield (
            f"preference.pairs={preference.pairs!r} names a run of a chain, but this run is none of a chain; sample "
            "pairs with python -m moe_vlm_jax.preferences generate, and name the file."
        )
    else:
        yield from idle("num_pairs temperature top_p", "with pairs from a file (they are for sampling)")
    if preference.loss not in ("sigmoid", "sigmoid_norm", "robust", "simpo"):
        yield from idle("label_smoothing", by_loss)
    if preference.loss != "simpo":
        yield from idle("gamma", by_loss)
    if preference.loss in ("simpo", "orpo"):
        yield from idle("reference precomputed", f"{by_loss}, which has no reference")
    dropouts = {
        "model.lora.dropout": model.lora.dropout,
        "model.decoder.embed_dropout": model.decoder.embed_dropout,
        "model.decoder.residual_dropout": model.decoder.residual_dropout,
    }
    for name, rate in dropouts.items():
        if rate:
            yield (
                f"{name}={rate} would make the policy differ from its reference by chance; preferences train without "
                "dropout; set it to 0.0."
            )
    if model.moe.dispatch == "capacity" and (model.moe.capacity_group != "row" or config.data.pack):
        yield (
            f"model.moe.capacity_group={model.moe.capacity_group!r} with data.pack={config.data.pack} lets pairs "
            "compete for the slots of experts, so a log-prob would depend on the other pairs of its batch; use 'row' "
            "and data.pack=False, or dispatch='dropless'."
        )
