"""A config.json being read, and the two sections of it that every kind of checkpoint has: decoder and tower.

`Fields` knows which fields were looked at, so that at the end the others can be named.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import families


class Fields:
    """A config.json being read: knows which fields were looked at, and collects mistakes and notes."""

    def __init__(self, raw: Mapping[str, Any], where: str, accept: Iterable[str] = ()):
        self.raw = dict(raw)
        self.where = where
        self.seen: set[str] = set(accept)
        self.mistakes: list[str] = []
        self.notes = [f"{where}: field {name}={raw[name]!r} accepted unread" for name in sorted(accept) if name in raw]

    def take(self, name: str, default: Any = families.REQUIRED) -> Any:
        """Returns a field, or the default where it is absent."""
        self.seen.add(name)
        if name not in self.raw and default is families.REQUIRED:
            self.mistakes.append(f"{self.where}: field {name} is missing; add it to config.json.")
            return None
        return self.raw.get(name, default)

    def must(self, rules: Mapping[str, Sequence[Any]]) -> None:
        """Notes a mistake for every field whose value is not an allowed one."""
        for name, allowed in rules.items():
            value = self.take(name, allowed[0])
            if value is not None and value not in allowed:
                self.mistakes.append(
                    f"{self.where}: {name}={value!r} is not implemented; only {' or '.join(map(repr, allowed))} is. "
                    f"Convert a checkpoint without it."
                )

    def finish(self, *inert: Iterable[str]) -> None:
        """Notes every field that was neither read nor is known to have no effect."""
        known = self.seen.union(families.INERT, *inert)
        for name in sorted(set(self.raw) - known):
            value = self.raw[name]
            if value is None or value is False or value in ([], {}, ""):
                self.notes.append(f"{self.where}: unknown field {name}={value!r} is off and was not read")
            else:
                self.mistakes.append(
                    f"{self.where}: field {name}={value!r} is unknown; if it does not change what the model computes, "
                    f"accept it by name (accept=({name!r},), --accept {name})."
                )


def read_decoder(fields: Fields, family: families.Family) -> config_lib.DecoderConfig:
    """Returns the language model that the fields describe; mistakes are collected in `fields`."""
    values = {**family.fixed, **{f.ours: fields.take(f.hf, f.default) for f in family.fields}}
    rope = fields.take("rope_parameters", None) or {}  # transformers 5 gathers the rotary settings here
    scaling = fields.take("rope_scaling", None)
    for kind in (rope.get("rope_type", "default"), (scaling or {}).get("rope_type", (scaling or {}).get("type"))):
        if kind not in ("default", None):
            fields.mistakes.append(f"{fields.where}: rope type {kind!r} is not implemented; only 'default' is.")
    if unknown := set(rope) - {"rope_type", "rope_theta", family.rotary[0]}:
        fields.mistakes.append(f"{fields.where}: rope_parameters has unknown {sorted(unknown)}; remove them.")
    theta = rope["rope_theta"] if "rope_theta" in rope else fields.take(*family.theta)
    fields.seen.add(family.theta[0])
    name, default = family.rotary
    share = 1.0
    if name is not None:
        share = rope[name] if name in rope else fields.take(name, default)
        fields.seen.add(name)
    if values.get("tie_embeddings") and values.get("lm_head_bias"):
        fields.mistakes.append(
            f"{fields.where}: tie_word_embeddings=True with a bias in lm_head is not implemented; untie them."
        )
    if fields.mistakes:
        return config_lib.DecoderConfig()
    heads, dim = values["num_heads"], values["embed_dim"]
    values["head_dim"] = values.get("head_dim") or dim // heads
    values["num_kv_heads"] = values.get("num_kv_heads") or heads
    values["rotary_dim"] = int(values["head_dim"] * share)
    values["rope_theta"] = float(theta)
    values["mlp_dim"] //= family.mlp_factor
    values["activation"] = _activation(fields, values["activation"])
    values["max_positions"] = max_positions(fields, family, values["max_positions"])
    fields.must(family.must | families.MUST)
    return config_lib.DecoderConfig(**values)


def read_experts(fields: Fields, family: families.Family) -> config_lib.MoEConfig:
    """Returns the experts of a plain language model."""
    if family.experts is None:
        return config_lib.MoEConfig(placement="none")
    count_field, count, top_k_field, top_k = family.experts
    count, top_k = fields.take(count_field, count), fields.take(top_k_field, top_k)
    if top_k < 2:
        fields.mistakes.append(
            f"{fields.where}: {top_k_field}={top_k} gives the one chosen expert the weight 1 there and its probability "
            "here; use a checkpoint with 2 or more."
        )
    return config_lib.MoEConfig(placement="dense", num_experts=(count,), top_k=top_k)


def read_tower(
    raw: Mapping[str, Any], where: str, accept: Sequence[str] = ()
) -> tuple[config_lib.VisionConfig, Fields]:
    """Returns the vision tower of a tower's config.json, or of CLIP's or SigLIP's, and the fields with mistakes."""
    parents = {tower.parent: tower for tower in families.TOWERS}
    if parent := parents.get(raw.get("model_type", "")):
        inner = {"model_type": parent.model_type, **raw.get("vision_config", {})}
        # Old CLIP configs hold the tower twice; transformers lets the second overrule the first.
        doubled = raw.get("vision_config_dict") or {}
        if clash := sorted(name for name in doubled if name in inner and inner[name] != doubled[name]):
            raise ValueError(
                f"{where}: vision_config_dict contradicts vision_config in {clash}; remove one of the two."
            )
        return read_tower({**inner, **doubled}, f"{where}: vision_config", accept)
    fields = Fields(raw, where, accept)
    tower = {t.model_type: t for t in families.TOWERS}.get(fields.take("model_type"))
    if tower is None:
        known = ", ".join(t.model_type for t in families.TOWERS)
        raise ValueError(f"{where}: model_type={raw.get('model_type')!r} is no vision tower; supported are {known}.")
    values = {**tower.fixed, **{f.ours: fields.take(f.hf, f.default) for f in tower.fields}}
    values["activation"] = _activation(fields, values["activation"])
    fields.must(families.TOWER_MUST | families.MUST)
    fields.finish(families.TOWER_INERT)
    return config_lib.VisionConfig(**values), fields


def _activation(fields: Fields, name: str) -> str:
    if name not in families.ACTIVATIONS:
        fields.mistakes.append(
            f"{fields.where}: activation {name!r} is unknown; known are {list(families.ACTIVATIONS)}."
        )
    return families.ACTIVATIONS.get(name, "gelu")


def max_positions(fields: Fields, family: families.Family, limit: int) -> int:
    """Returns how long a row may be before a setting that is not implemented would take effect."""
    limits = {"max_position_embeddings": limit}
    if family is families.QWEN and (fields.raw.get("use_dynamic_ntk", True) or fields.raw.get("use_logn_attn", True)):
        limits["seq_length"] = fields.take("seq_length")
    elif family is families.QWEN:
        fields.take("seq_length", None)
    if family in (families.MISTRAL, families.MIXTRAL, families.QWEN2):
        window = fields.take("sliding_window", 4096 if family is families.MISTRAL else None)
        slides = fields.take("use_sliding_window", family is not families.QWEN2)
        fields.take("max_window_layers", None)
        kinds = set(fields.take("layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention"}:
            fields.mistakes.append(f"{fields.where}: layer_types {sorted(kinds)} are not implemented.")
        if window is not None and (slides or "sliding_attention" in kinds):
            limits["sliding_window"] = window
    truncation = fields.take("tokenizer_model_max_length", None)
    if truncation is not None:
        limits["tokenizer_model_max_length"] = truncation
    name = min(limits, key=lambda key: limits[key])
    if limits[name] < limit:
        fields.notes.append(f"{fields.where}: max_positions is {limits[name]}, by {name}, instead of {limit}")
    return limits[name]
