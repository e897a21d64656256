"""Our config to the config.json of a layout.

What is written is read back with `hf/configs.py` and must give the same config, so there is one set of rules, and a
model that a layout cannot express is an error that names the fields.
"""

import copy
import dataclasses
import pathlib
import tempfile
from typing import Any

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import configs, families
from moe_vlm_jax.hf import fields as fields_lib

_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")


def config_json(
    config: config_lib.ModelConfig, layout: str, *, base: configs.Checkpoint | None, dtype: str
) -> dict[str, Any]:
    """Returns the contents of config.json.

    Args:
      config: of the model.
      layout: moe_llava | lm | vision | llava.
      base: the checkpoint that the model came from, whose other fields (token ids, spelling) are kept.
      dtype: of the tensors, for the record.

    Raises:
      ValueError: the layout cannot express the model.
    """
    writers = {"moe_llava": _moe_llava, "lm": _language_model, "vision": _tower_only, "llava": _llava}
    if layout not in writers:
        raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(writers)}.")
    if layout != "vision" and any(config.layer_experts) and config.moe.router != "topk":
        raise ValueError(
            f"model.moe.router={config.moe.router!r} has no field in layout {layout!r}, whose readers let every token "
            "choose among all experts; keep the model in its run's own checkpoint."
        )
    # A tower is always described anew: what it came from may hold more than the tower.
    if (
        layout != "vision"
        and base is not None
        and base.layout == layout
        and not _contradictions(config, base.raw, layout, base)
    ):
        raw = copy.deepcopy(base.raw)
    else:
        raw = writers[layout](config, base)
    if layout == "moe_llava" and _needs_tower(raw, config):
        raw["mm_vision_config"] = tower_json(config.vision, base)
    for name in ("torch_dtype", "dtype"):
        if name in raw or (name == "torch_dtype" and "dtype" not in raw):
            raw[name] = dtype
    return raw


def family_of(raw: dict[str, Any]) -> families.Family | None:
    """Returns the family of a config.json that `config_json` returned; None for a tower alone."""
    kind = raw.get("text_config", raw).get("model_type", "llama")
    return next((f for f in families.FAMILIES if f.model_type == kind), None) or configs.llava_family(kind)


def tower_json(vision: config_lib.VisionConfig, base: configs.Checkpoint | None) -> dict[str, Any]:
    """Returns the config.json of a vision tower alone."""
    tower = next((t for t in families.TOWERS if t.fixed["class_token"] == vision.class_token), families.CLIP)
    known = (base.vision_raw if base is not None else None) or {}
    known = known.get("vision_config", known) if known.get("model_type") == tower.parent else known
    old = {name: known[name] for name in ("hidden_act", "initializer_range", "projection_dim") if name in known}
    raw = {"architectures": [tower.architecture], "model_type": tower.model_type, "num_channels": 3, **old}
    if tower is families.SIGLIP:
        raw["vision_use_head"] = False  # the pooling head behind the tower is not held here
    _put(raw, tower.fields, vision)
    return raw


def _language_model(config: config_lib.ModelConfig, base: configs.Checkpoint | None) -> dict[str, Any]:
    counts = set(config.layer_experts)
    moe = config.moe
    if counts != {0} and (0 in counts or len(counts) > 1 or moe.use_residual or not moe.renormalize or moe.top_k < 2):
        raise ValueError(
            f"experts by layer are {config.layer_experts} with moe.top_k={moe.top_k}, moe.renormalize="
            f"{moe.renormalize} and moe.use_residual={moe.use_residual}; layout 'lm' holds dense models and those with "
            "equal experts in every layer, 2 or more a token, renormalised; use 'moe_llava'."
        )

    def make(family: families.Family) -> dict[str, Any] | None:
        if (family.experts is None) != (counts == {0}):
            return None
        raw = _decoder_json(config.decoder, family, base)
        if family.experts is not None:
            raw |= {family.experts[0]: max(counts), family.experts[2]: moe.top_k}
        return raw

    return _fit(config, "lm", base, make)


def _moe_llava(config: config_lib.ModelConfig, base: configs.Checkpoint | None) -> dict[str, Any]:
    def make(family: families.Family) -> dict[str, Any] | None:
        if family.llava is None:
            return None
        raw = _decoder_json(config.decoder, family, base)
        experts = any(config.layer_experts)
        raw["model_type"] = f"{'moe_' * experts}llava_{family.llava}"
        raw["architectures"] = [f"{'MoELLaVA' if experts else 'Llava'}{family.llava_class}ForCausalLM"]
        raw.update(_mm_json(config, base))
        if experts:
            raw["moe"] = _moe_json(config, family, base)
        return raw

    return _fit(config, "moe_llava", base, make)


def _llava(config: config_lib.ModelConfig, base: configs.Checkpoint | None) -> dict[str, Any]:
    if base is None or base.layout != "llava":
        raise ValueError("layout 'llava' is written only for a model that was read from it; use 'moe_llava'.")
    raise ValueError(
        "the model no longer fits the config.json that it came with: "
        + "; ".join(_contradictions(config, base.raw, "llava", base))
        + "; write layout 'moe_llava'."
    )


def _tower_only(config: config_lib.ModelConfig, base: configs.Checkpoint | None) -> dict[str, Any]:
    raw = tower_json(config.vision, base)
    if mistakes := _contradictions(config, raw, "vision", base):
        raise ValueError("layout 'vision' cannot express this tower: " + "; ".join(mistakes))
    return raw


def _fit(config, layout: str, base: configs.Checkpoint | None, make) -> dict[str, Any]:
    """Returns the config.json of the first family that reads back as the same config, the base's own family first."""
    own = [base.family] if base is not None and base.family is not None else []
    if own == [families.STABLELM_EPOCH] and layout == "lm" and base is not None and base.layout != "lm":
        own = []  # transformers knows the same model as stablelm
    tried = []
    for family in [*own, *(f for f in families.FAMILIES if f not in own)]:
        raw = make(family)
        if raw is None:
            continue
        mistakes = _contradictions(config, raw, layout, base)
        if not mistakes:
            return raw
        tried.append(f"  {family.model_type}: {'; '.join(mistakes[:3])}")
    raise ValueError(
        f"no model family of layout {layout!r} can express this decoder:\n"
        + "\n".join(tried)
        + "\nKeep it as a training checkpoint, or train with one of these families' settings."
    )


def _contradictions(config, raw: dict[str, Any], layout: str, base: configs.Checkpoint | None) -> list[str]:
    """Returns in what a config.json, read back, differs from the config."""
    tower = tower_json(config.vision, base)
    with tempfile.TemporaryDirectory() as folder:
        where = pathlib.Path(folder)
        configs.write_json(where / "config.json", raw)
        (where / "tower").mkdir()
        configs.write_json(where / "tower" / "config.json", tower)
        accept = sorted(set(base.raw)) if base is not None and base.layout == layout else []
        try:
            info = configs.read(where, vision=where / "tower" if layout == "moe_llava" else None, accept=accept)
        except ValueError as error:
            return str(error).split("\n")
    sections = {"moe_llava": ("decoder", "vision", "projector"), "lm": ("decoder",), "vision": ("vision",)}
    sections = sections.get(layout, ("decoder", "vision", "projector"))
    found = configs.differences(config, info, sections)
    # `differences` lets a loader choose these; a writer may not lose them.
    for name in ("max_positions", "lm_head_bias") if "decoder" in sections else ():
        mine, theirs = getattr(config.decoder, name), getattr(info.config.decoder, name)
        if mine != theirs:
            found.append(f"decoder.{name}={mine} becomes {theirs}")
    mine, theirs = config.moe.top_k, info.config.moe.top_k
    if any(config.layer_experts) and "decoder" in sections and mine != theirs:
        found.append(f"moe.top_k={mine} becomes {theirs}")
    return found


def _put(raw: dict[str, Any], fields: tuple[families.Field, ...], section: Any) -> None:
    """Writes our fields under HF's names; an activation keeps its spelling where that means the same."""
    for field in fields:
        value = getattr(section, field.ours)
        if field.ours == "activation":
            if families.ACTIVATIONS.get(raw.get(field.hf, field.default)) == value:
                value = raw.get(field.hf, field.default)
            else:
                value = next(hf for hf, ours in families.ACTIVATIONS.items() if ours == value)
        raw[field.hf] = value


def _decoder_json(
    decoder: config_lib.DecoderConfig, family: families.Family, base: configs.Checkpoint | None
) -> dict[str, Any]:
    old = {} if base is None else base.raw.get("text_config", base.raw)
    raw = {"architectures": [family.architecture], "model_type": family.model_type}
    raw |= {name: old[name] for name in _CARRIED if name in old}
    if base is not None and base.family is family and "hidden_act" in old:
        raw["hidden_act"] = old["hidden_act"]
    _put(raw, family.fields, decoder)
    raw |= {name: allowed[0] for name, allowed in family.must.items()}
    raw["intermediate_size"] = decoder.mlp_dim * family.mlp_factor
    raw[family.theta[0]] = decoder.rope_theta
    if family.rotary[0]:
        share = decoder.rotary_dim / decoder.head_dim
        # int() of the product must give rotary_dim back.
        raw[family.rotary[0]] = share if int(decoder.head_dim * share) == decoder.rotary_dim else share + 1e-6
    if family is families.QWEN:
        raw |= {"seq_length": decoder.max_positions, "use_dynamic_ntk": True, "use_logn_attn": True, "fp32": False}
        raw |= {"bf16": False, "fp16": False, "use_flash_attn": False, "softmax_in_fp32": False}
        raw |= {"use_cache_quantization": False, "use_cache_kernel": False}
    if family in (families.MISTRAL, families.MIXTRAL):
        raw["sliding_window"] = None
    return raw


def _mm_json(config: config_lib.ModelConfig, base: configs.Checkpoint | None) -> dict[str, Any]:
    """Returns the reference's fields about images."""
    own = base.raw if base is not None and base.layout == "moe_llava" else {}
    skipped = config.vision.skip_tokens
    if skipped not in (0, 1):
        raise ValueError(f"vision.skip_tokens={skipped}; the reference can withhold none or the first token.")
    return {
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": own.get("image_aspect_ratio", "pad"),
        "image_projector_type": config.projector,
        "mm_hidden_size": config.vision.embed_dim,
        "mm_image_tower": own.get("mm_image_tower") or _tower_name(config.vision, base),
        "mm_projector_lr": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_video_tower": None,
        "mm_vision_select_feature": "patch" if skipped else "cls_patch",
        "mm_vision_select_layer": config.vision.select_layer,
        "tokenizer_padding_side": own.get("tokenizer_padding_side", "right"),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "video_global_proj": False,
        "video_projector_type": "linear",
        "video_spatial_proj": False,
        "video_temproal_proj": False,
    }


def _tower_name(vision: config_lib.VisionConfig, base: configs.Checkpoint | None) -> str:
    """Returns the name under which the reference loads the tower: the published one where the sizes agree."""
    for name, raw in families.KNOWN_TOWERS.items():
        if raw["image_size"] == vision.image_size and raw["hidden_size"] == vision.embed_dim:
            return name
    folder = base.vision_folder if base is not None else None
    if folder is None:
        return "image_tower"
    organisation = folder.parent.name
    return f"{organisation}/{folder.name}" if organisation in ("openai", "laion", "google") else folder.name


def _moe_json(
    config: config_lib.ModelConfig, family: families.Family, base: configs.Checkpoint | None
) -> dict[str, Any]:
    moe = config.moe
    layers = [i for i, experts in enumerate(config.layer_experts) if experts]
    old = (base.raw.get("moe") or {}) if base is not None else {}
    return {
        "capacity_factor": moe.capacity_factor,
        "ep_size": 1,
        "eval_capacity_factor": moe.eval_capacity_factor,
        "min_capacity": moe.min_capacity,
        "moe_enable": True,
        "moe_layers_idx": layers,
        "moe_mode": moe.placement if moe.placement != "none" else "sparse",
        "num_experts": [config.layer_experts[i] for i in layers],
        "router_aux_loss_coef": moe.balance_coef,
        "top_k_experts": moe.top_k,
        "train_modules": old.get("train_modules", list(family.train_modules)),
        "use_residual": moe.use_residual,
    }


def _needs_tower(raw: dict[str, Any], config: config_lib.ModelConfig) -> bool:
    """Whether the named tower is unknown here, so that config.json must describe it."""
    known = families.KNOWN_TOWERS.get(raw.get("mm_image_tower", ""))
    if known is None:
        return True
    tower, _ = fields_lib.read_tower(known, "known tower")
    same = {"select_layer": config.vision.select_layer, "skip_tokens": config.vision.skip_tokens}
    same |= {"position_init_std": config.vision.position_init_std}
    return dataclasses.replace(tower, **same) != config.vision
