"""config.json to our config and back.

A field that we cannot honour is an error, a field that has no effect here is listed in `hf/families.py`, and any other
field is an error too unless the caller accepts it by name: nothing in a config.json is ignored unseen.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import families, readers
from moe_vlm_jax.hf import fields as fields_lib
from moe_vlm_jax.models import projector as projector_lib


class Checkpoint(NamedTuple):
    """What a folder holds, by its config.json.

    Attributes:
      folder: the checkpoint.
      layout: key of `names.LAYOUTS`.
      family: kind of language model; None for a tower alone.
      config: our config; a section that the folder does not describe keeps our defaults.
      sections: which sections of the config were described.
      raw: config.json as it is.
      vision_raw: the tower's own config.json, if any.
      vision_folder: where to find the tower's weights if the checkpoint holds none.
      notes: remarks for the user.
    """

    folder: pathlib.Path
    layout: str
    family: families.Family | None
    config: config_lib.ModelConfig
    sections: frozenset[str]
    raw: dict[str, Any]
    vision_raw: dict[str, Any] | None
    vision_folder: pathlib.Path | None
    notes: tuple[str, ...]


def read(
    folder: str | pathlib.Path, *, vision: str | pathlib.Path | None = None, accept: Sequence[str] = ()
) -> Checkpoint:
    """Returns what a checkpoint folder holds.

    Args:
      folder: with config.json.
      vision: folder of a vision tower that overrides, or completes, what the checkpoint says.
      accept: unknown fields of config.json that the caller vouches for.

    Raises:
      ValueError: all settings that are not implemented, missing or unknown, in one message.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a checkpoint in HF layout.")
    fields = fields_lib.Fields(readers.read_json(path), str(path), accept)
    model_type = fields.take("model_type")
    plain = {family.model_type: family for family in families.FAMILIES}
    towers = {kind: tower for tower in families.TOWERS for kind in (tower.model_type, tower.parent)}
    if model_type == "llava":
        result = _read_llava(fields, folder, vision, accept)
    elif model_type in towers:
        result = _read_tower_folder(fields, folder, accept)
    elif model_type in plain:
        result = _read_language_model(fields, folder, plain[model_type], vision, accept)
    elif family := llava_family(model_type):
        result = _read_moe_llava(fields, folder, family, vision, accept)
    else:
        llava = [f"[moe_]llava_{family.llava}" for family in families.FAMILIES if family.llava]
        known = ", ".join([*plain, *llava, *towers, "llava"])
        raise ValueError(f"{path}: model_type={model_type!r} is not supported; supported are {known}.")
    if fields.mistakes:
        raise ValueError("\n".join(fields.mistakes))
    return result._replace(notes=tuple(fields.notes))


def differences(config: config_lib.ModelConfig, info: Checkpoint, sections: Iterable[str]) -> list[str]:
    """Returns in what a model's config contradicts a checkpoint, as far as it would compute something else.

    Args:
      config: of the model.
      info: of the checkpoint.
      sections: of the model that are loaded: decoder, vision, projector.
    """
    mistakes = []
    held = set(sections) & info.sections
    free = {"max_positions", "embed_dropout", "residual_dropout", "embed_init_std", "position_init_std"}
    if info.layout in ("lm", "vision"):
        free |= {"select_layer", "skip_tokens"}  # a choice of whoever joins the two
    if info.family is families.PHI:
        free |= {"lm_head_bias"}  # the loader reports a bias that is discarded
    for section in sorted(held - {"projector"}):
        mine, theirs = getattr(config, section), getattr(info.config, section)
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if a != b and field.name not in free:
                mistakes.append(f"config.{section}.{field.name}={a!r}, but the checkpoint has {b!r}.")
    if "decoder" in held:
        mine, theirs = config.decoder.max_positions, info.config.decoder.max_positions
        if mine > theirs:
            mistakes.append(f"config.decoder.max_positions={mine} exceeds the checkpoint's {theirs}.")
        if config.layer_experts != info.config.layer_experts:
            mistakes.append(
                f"experts by layer are {config.layer_experts}, but the checkpoint has {info.config.layer_experts}; "
                "set config.moe as the checkpoint's."
            )
        elif any(config.layer_experts) and config.moe.use_residual != info.config.moe.use_residual:
            mistakes.append(f"config.moe.use_residual={config.moe.use_residual}, unlike the checkpoint.")
    if "projector" in held and config.projector != info.config.projector:
        mistakes.append(f"config.projector={config.projector!r}, but the checkpoint has {info.config.projector!r}.")
    return mistakes


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON as transformers does: indented, sorted, one line end at the end."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def llava_family(model_type: str | None) -> families.Family | None:
    """Returns the family of one of the reference's model types, or None."""
    by_name = {f"{moe}llava_{f.llava}": f for f in families.FAMILIES if f.llava for moe in ("", "moe_")}
    return by_name.get(model_type or "")


def _read_language_model(fields, folder, family, vision, accept) -> Checkpoint:
    decoder = fields_lib.read_decoder(fields, family)
    moe = fields_lib.read_experts(fields, family)
    fields.finish(family.inert)
    sections, tower, vision_raw = {"decoder"}, config_lib.VisionConfig(), None
    if vision is not None:
        tower, vision_raw = _tower_of(fields, pathlib.Path(vision), accept)
        sections.add("vision")
        if decoder.lm_head_bias:
            decoder.lm_head_bias = False
            fields.notes.append(
                f"{fields.where}: the bias of Phi's lm_head is discarded, because LLaVA-Phi models have none"
            )
    config = config_lib.ModelConfig(decoder=decoder, vision=tower, moe=moe)
    folder_of_tower = None if vision is None else pathlib.Path(vision)
    return Checkpoint(folder, "lm", family, config, frozenset(sections), fields.raw, vision_raw, folder_of_tower, ())


def _read_tower_folder(fields, folder, accept) -> Checkpoint:
    tower, inner = fields_lib.read_tower(fields.raw, fields.where, accept)
    fields.mistakes += inner.mistakes
    fields.notes += inner.notes
    config = config_lib.ModelConfig(vision=tower)
    return Checkpoint(folder, "vision", None, config, frozenset({"vision"}), fields.raw, fields.raw, folder, ())


def _read_llava(fields, folder, vision, accept) -> Checkpoint:
    text = fields_lib.Fields(fields.take("text_config"), f"{fields.where}: text_config", accept)
    plain = {family.model_type: family for family in families.FAMILIES if family.experts is None}
    family = plain.get(text.take("model_type", "llama"))
    if family is None:
        raise ValueError(
            f"{text.where}: model_type={text.raw['model_type']!r} is not supported; use {', '.join(plain)}."
        )
    decoder = fields_lib.read_decoder(text, family)
    text.finish(family.inert)
    decoder.tie_embeddings = bool(fields.take("tie_word_embeddings", False)) or decoder.tie_embeddings
    tower_raw = fields.take("vision_config")
    tower, inner = fields_lib.read_tower(tower_raw, f"{fields.where}: vision_config", accept)
    fields.must({"projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,), **families.MUST})
    layer = fields.take("vision_feature_layer", -2)
    strategy = fields.take("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or strategy not in ("default", "full"):
        fields.mistakes.append(
            f"{fields.where}: vision_feature_layer={layer!r} with vision_feature_select_strategy={strategy!r} is not "
            "implemented; one layer and 'default' or 'full' is."
        )
        layer = -2
    tower.select_layer, tower.skip_tokens = layer, int(strategy == "default")
    # Which token stands for an image is the data side's business; how many it becomes follows from the tower.
    fields.finish({"image_token_index", "image_token_id", "image_seq_length", "ignore_index", "vocab_size"})
    fields.mistakes += text.mistakes + inner.mistakes
    fields.notes += text.notes + inner.notes
    config = config_lib.ModelConfig(
        decoder=decoder, vision=tower, projector="mlp2x_gelu", moe=config_lib.MoEConfig(placement="none")
    )
    sections = frozenset({"decoder", "vision", "projector"})
    return Checkpoint(folder, "llava", family, config, sections, fields.raw, tower_raw, None, ())


def _read_moe_llava(fields, folder, family, vision, accept) -> Checkpoint:
    decoder = fields_lib.read_decoder(fields, family)
    decoder.lm_head_bias = False
    moe = _read_moe(fields, decoder.num_layers)
    vision_folder, vision_raw = _find_tower(fields, folder, vision)
    tower, inner = fields_lib.read_tower(vision_raw, f"tower of {fields.where}", accept)
    fields.mistakes += inner.mistakes
    fields.notes += inner.notes
    tower.select_layer = fields.take("mm_vision_select_layer")
    feature = fields.take("mm_vision_select_feature", "patch")
    # 'patch' drops the first token whatever it is: with SigLIP that is a real patch.
    tower.skip_tokens = int(feature == "patch")
    fields.must(
        {
            "mm_vision_select_feature": ("patch", "cls_patch"),
            "use_mm_proj": (True,),
            "mm_use_im_start_end": (False,),
            "mm_video_tower": (None,),
            "mm_hidden_size": (tower.embed_dim,),
        }
    )
    projector = fields.take("image_projector_type") or "mlp2x_gelu"
    try:
        projector_lib.num_linears(projector)
    except ValueError as error:
        fields.mistakes.append(f"{fields.where}: image_projector_type: {error}")
    fields.finish(family.inert, families.LLAVA_INERT)
    config = config_lib.ModelConfig(decoder=decoder, vision=tower, projector=projector, moe=moe)
    sections = frozenset({"decoder", "vision", "projector"})
    return Checkpoint(folder, "moe_llava", family, config, sections, fields.raw, vision_raw, vision_folder, ())


def _read_moe(fields: fields_lib.Fields, num_layers: int) -> config_lib.MoEConfig:
    """Returns the experts; the dispatch stays our default, 'capacity' with the factors read here is the reference's."""
    raw = fields.take("moe", None)
    if not raw or not raw.get("moe_enable", True):
        return config_lib.MoEConfig(placement="none")
    moe = fields_lib.Fields(raw, f"{fields.where}: moe")
    layers, counts = tuple(moe.take("moe_layers_idx") or ()), tuple(moe.take("num_experts") or ())
    mode = moe.take("moe_mode", "sparse")
    if mode not in config_lib.PLACEMENTS:
        moe.mistakes.append(f"{moe.where}: moe_mode={mode!r} is unknown; known are {config_lib.PLACEMENTS}.")
        mode = "sparse"
    if not layers or len(counts) not in (1, len(layers)) or max(layers) >= num_layers:
        moe.mistakes.append(
            f"{moe.where}: moe_layers_idx={list(layers)} and num_experts={list(counts)} do not name layers below "
            f"{num_layers} with one count each; correct config.json."
        )
    result = config_lib.MoEConfig(
        placement=mode,
        layers=layers,
        num_experts=counts[:1] if len(set(counts)) == 1 else counts,
        top_k=moe.take("top_k_experts"),
        capacity_factor=moe.take("capacity_factor"),
        eval_capacity_factor=moe.take("eval_capacity_factor"),
        min_capacity=moe.take("min_capacity"),
        use_residual=moe.take("use_residual", False),
        balance_coef=moe.take("router_aux_loss_coef", 0.01),
    )
    moe.finish(families.MOE_INERT)
    fields.mistakes += moe.mistakes
    fields.notes += moe.notes
    if not moe.mistakes:
        by_mode = dataclasses.replace(result, layers=())
        if len(by_mode.num_experts) == 1 and config_lib.layer_experts(by_mode, num_layers) == config_lib.layer_experts(
            result, num_layers
        ):
            return by_mode
    return result


def _find_tower(fields: fields_lib.Fields, folder: pathlib.Path, vision) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """Returns the folder of the tower (None: the checkpoint itself) and its config.json."""
    name = fields.take("mm_image_tower") or ""
    if vision is not None:
        return pathlib.Path(vision), readers.read_json(pathlib.Path(vision) / "config.json")
    candidates = [folder / name, folder.parent / name, pathlib.Path(name)] if name else []
    local = next((path for path in candidates if (path / "config.json").is_file()), None)
    if "mm_vision_config" in fields.raw:
        return local, fields.raw["mm_vision_config"]
    if local is not None:
        return local, readers.read_json(local / "config.json")
    if name in families.KNOWN_TOWERS:
        return None, families.KNOWN_TOWERS[name]
    raise ValueError(
        f"{fields.where}: mm_image_tower={name!r} is neither a folder beside the checkpoint nor a known tower "
        f"({', '.join(families.KNOWN_TOWERS)}); give its folder as `vision`."
    )


def _tower_of(
    fields: fields_lib.Fields, folder: pathlib.Path, accept
) -> tuple[config_lib.VisionConfig, dict[str, Any]]:
    raw = readers.read_json(folder / "config.json")
    tower, inner = fields_lib.read_tower(raw, str(folder / "config.json"), accept)
    fields.mistakes += inner.mistakes
    fields.notes += inner.notes
    return tower, raw
