"""Tensor names of HF checkpoints and our parameter paths: one table per model, read in both directions.

An entry ties one tensor to one place in our tree, in layer coordinates: {layer} and {expert} count up, and the left
side is relative to the prefix that a `Layout` gives its section. A table lists everything that a model of that family
may hold (biases, experts, a residual MLP); which of it exists is decided by our abstract model, so a config that
disagrees with the checkpoint shows up as missing or unused tensors.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor of a checkpoint.

    `ours` holds several paths where the checkpoint fuses what we keep apart (rows of the tensor, in that order).
    """

    hf: str
    ours: tuple[str, ...]
    # copy | transpose ([..., out, in] -> [..., in, out]) | patch ([C, 3, p, p] -> [p*p*3, C])
    transform: str = "copy"


def linear(hf: str, *ours: str) -> tuple[Entry, ...]:
    """Returns the entries of a linear layer; both sides may lack the bias."""
    return (
        Entry(f"{hf}.weight", tuple(f"{path}/kernel" for path in ours), "transpose"),
        Entry(f"{hf}.bias", tuple(f"{path}/bias" for path in ours)),
    )


def norm(hf: str, ours: str) -> tuple[Entry, ...]:
    """Returns the entries of a LayerNorm, or of an RMSNorm, which has no bias."""
    return Entry(f"{hf}.weight", (f"{ours}/scale",)), Entry(f"{hf}.bias", (f"{ours}/bias",))


def mlp(hf: str, ours: str, linears: dict[str, str]) -> tuple[Entry, ...]:
    """Returns the entries of an MLP in each of its four places: dense, expert, residual, and the router's own.

    Args:
      hf: the MLP module of a layer, e.g. 'layers.{layer}.mlp'.
      ours: the layer, e.g. 'decoder/layers/{layer}'.
      linears: our name -> HF's name of each linear layer.
    """
    entries = [
        *linear(f"{hf}.deepspeed_moe.gate.wg", f"{ours}/moe/router"),
        *linear(f"{hf}.coefficient", f"{ours}/moe/coefficient"),
    ]
    for mine, theirs in linears.items():
        entries += linear(f"{hf}.{theirs}", f"{ours}/mlp/{mine}")
        expert = f"{hf}.deepspeed_moe.experts.deepspeed_experts.{{expert}}.{theirs}"
        entries += linear(expert, f"{ours}/moe/experts/{mine}")
        entries += linear(f"{hf}.mlp.{theirs}", f"{ours}/moe/residual/{mine}")
    return tuple(entries)


def attention(hf: str, ours: str, output: str) -> tuple[Entry, ...]:
    """Returns the entries of an attention with separate q, k and v."""
    entries = []
    for mine, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": output}.items():
        entries += linear(f"{hf}.{theirs}", f"{ours}/attention/{mine}")
    return tuple(entries)


_LAYER = "decoder/layers/{layer}"

PHI = (
    Entry("embed_tokens.weight", ("decoder/embed/embedding",)),
    *norm("layers.{layer}.input_layernorm", f"{_LAYER}/attention_norm"),
    *attention("layers.{layer}.self_attn", _LAYER, "dense"),
    *mlp("layers.{layer}.mlp", _LAYER, {"up": "fc1", "down": "fc2"}),
    *norm("final_layernorm", "decoder/final_norm"),
)

# StableLM, Llama, Mistral and Qwen2 share their names and differ in which biases exist.
LLAMA = (
    Entry("embed_tokens.weight", ("decoder/embed/embedding",)),
    *norm("layers.{layer}.input_layernorm", f"{_LAYER}/attention_norm"),
    *attention("layers.{layer}.self_attn", _LAYER, "o_proj"),
    *norm("layers.{layer}.post_attention_layernorm", f"{_LAYER}/mlp_norm"),
    *mlp("layers.{layer}.mlp", _LAYER, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    *norm("norm", "decoder/final_norm"),
)

# Qwen-1: c_proj(w1(x) * silu(w2(x))), so w2 is the gate.
QWEN = (
    Entry("wte.weight", ("decoder/embed/embedding",)),
    *norm("h.{layer}.ln_1", f"{_LAYER}/attention_norm"),
    *linear("h.{layer}.attn.c_attn", *(f"{_LAYER}/attention/{part}" for part in "qkv")),
    *linear("h.{layer}.attn.c_proj", f"{_LAYER}/attention/o"),
    *norm("h.{layer}.ln_2", f"{_LAYER}/mlp_norm"),
    *mlp("h.{layer}.mlp", _LAYER, {"gate": "w2", "up": "w1", "down": "c_proj"}),
    *norm("ln_f", "decoder/final_norm"),
)


def _mixtral(experts: tuple[Entry, ...], moe: str) -> tuple[Entry, ...]:
    return (
        Entry("embed_tokens.weight", ("decoder/embed/embedding",)),
        *norm("layers.{layer}.input_layernorm", f"{_LAYER}/attention_norm"),
        *attention("layers.{layer}.self_attn", _LAYER, "o_proj"),
        *norm("layers.{layer}.post_attention_layernorm", f"{_LAYER}/mlp_norm"),
        *linear(f"layers.{{layer}}.{moe}.gate", f"{_LAYER}/moe/router"),
        *(entry._replace(hf=f"layers.{{layer}}.{moe}.experts.{entry.hf}") for entry in experts),
        *norm("norm", "decoder/final_norm"),
    )


_EXPERTS = f"{_LAYER}/moe/experts"

# Every layer holds experts. On disk each has its linears; a model of transformers 5 stacks them, [E, out, in], with
# gate above up.
MIXTRAL = _mixtral(
    tuple(
        entry
        for mine, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items()
        for entry in linear(f"{{expert}}.{theirs}", f"{_EXPERTS}/{mine}")
    ),
    "block_sparse_moe",
)
MIXTRAL_STACKED = _mixtral(
    (
        Entry("gate_up_proj", (f"{_EXPERTS}/gate/kernel", f"{_EXPERTS}/up/kernel"), "transpose"),
        Entry("down_proj", (f"{_EXPERTS}/down/kernel",), "transpose"),
    ),
    "mlp",
)

LM_HEAD = linear("lm_head", "decoder/lm_head")

_VISION_LAYER = "vision/layers/{layer}"

# CLIP and SigLIP: SigLIP has no class token and no first norm, CLIP no bias of the patches. (The missing n is HF's.)
VISION = (
    Entry("embeddings.class_embedding", ("vision/class_embed",)),
    Entry("embeddings.patch_embedding.weight", ("vision/patch_embed/kernel",), "patch"),
    Entry("embeddings.patch_embedding.bias", ("vision/patch_embed/bias",)),
    Entry("embeddings.position_embedding.weight", ("vision/position_embed",)),
    *norm("pre_layrnorm", "vision/pre_norm"),
    *norm("encoder.layers.{layer}.layer_norm1", f"{_VISION_LAYER}/norm1"),
    *attention("encoder.layers.{layer}.self_attn", _VISION_LAYER, "out_proj"),
    *norm("encoder.layers.{layer}.layer_norm2", f"{_VISION_LAYER}/norm2"),
    *linear("encoder.layers.{layer}.mlp.fc1", f"{_VISION_LAYER}/mlp/up"),
    *linear("encoder.layers.{layer}.mlp.fc2", f"{_VISION_LAYER}/mlp/down"),
    *norm("post_layernorm", "vision/post_norm"),
)

# nn.Sequential(Linear, GELU, Linear, ...): the linears have the even numbers.
PROJECTOR_SEQUENTIAL = tuple(e for i in range(8) for e in linear(f"{2 * i}", f"projector/linears/{i}"))
PROJECTOR_LINEAR = linear("", "projector/linears/0")  # image_projector_type 'linear' is one bare Linear
PROJECTOR_LLAVA = (*linear("linear_1", "projector/linears/0"), *linear("linear_2", "projector/linears/1"))

DECODERS = {"phi": PHI, "llama": LLAMA, "qwen": QWEN, "mixtral": MIXTRAL}
STACKED_DECODERS = {**DECODERS, "mixtral": MIXTRAL_STACKED}


class Layout(NamedTuple):
    """Where each section of a model sits in a checkpoint: a prefix, or None where there is none.

    `stacked`: experts are one tensor [E, out, in] where the family has such a form.
    """

    decoder: str | None = None
    head: str | None = None
    vision: str | None = None
    projector: str | None = None
    stacked: bool = False


# The first of a list is what is written; the others are also read. `root` is 'transformer.' for Qwen-1, else 'model.'.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "moe_llava": (
        Layout(
            "{root}",
            "",
            "{root}image_tower.image_tower.vision_model.",
            "{root}mm_projector.image_spatial_proj.",
        ),
    ),
    "lm": (Layout("{root}", ""), Layout("{root}", "", stacked=True)),
    "vision": (Layout(vision="vision_model."), Layout(vision="")),
    # The hub's layout (transformers 4 and what transformers 5 writes), then transformers 5's own module names.
    "llava": (
        Layout("language_model.model.", "language_model.", "vision_tower.vision_model.", "multi_modal_projector."),
        Layout("language_model.model.", "language_model.", "vision_tower.", "multi_modal_projector."),
        Layout("model.language_model.", "", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
        Layout("model.language_model.", "", "model.vision_tower.", "model.multi_modal_projector."),
    ),
    # Stage 1's mm_projector.bin: the loader of the reference keeps what follows 'mm_projector.'.
    "projector": (
        Layout(projector="{root}mm_projector.image_spatial_proj."),
        Layout(projector="{root}mm_projector."),
        Layout(projector="mm_projector."),
    ),
}

# The names that parameters have in a model of transformers 5 or of the reference, which PEFT's adapters go by.
MODULES: dict[str, Layout] = {
    "moe_llava": LAYOUTS["moe_llava"][0],
    "lm": LAYOUTS["lm"][1],
    "vision": LAYOUTS["vision"][1],
    "llava": LAYOUTS["llava"][3],
}

# Tensors that no computation here reads: buffers that are recomputed, and the parts of CLIP / SigLIP after the tower.
IGNORABLE = (
    r".*\.rotary_emb\.inv_freq",
    r".*\.rotary_emb\.(cos|sin)_cached",
    r".*\.masked_bias",
    r"(.*\.)?embeddings\.position_ids",
    r"text_model\..*",
    r"(text_projection|visual_projection)\.weight",
    r"logit_scale",
    r"logit_bias",
    r"(.*vision_model\.|.*vision_tower\.)?head\.(probe|attention\.|layernorm\.|mlp\.).*",
)


def projector_table(kind: str, layout: str) -> tuple[Entry, ...]:
    """Returns the table of a projector.

    Args:
      kind: `ModelConfig.projector`.
      layout: key of LAYOUTS.
    """
    if layout == "llava":
        return PROJECTOR_LLAVA
    if kind == "linear":
        return tuple(Entry(e.hf.removeprefix("."), *e[1:]) for e in PROJECTOR_LINEAR)
    return PROJECTOR_SEQUENTIAL


def table(layout: str, variant: Layout, family: str | None, projector: str) -> tuple[Entry, ...]:
    """Returns the entries of a whole checkpoint, with full tensor names.

    Args:
      layout: key of LAYOUTS.
      variant: one of LAYOUTS[layout].
      family: key of DECODERS; None for a tower alone.
      projector: `ModelConfig.projector`.
    """
    decoders = STACKED_DECODERS if variant.stacked else DECODERS
    sections = {
        "decoder": decoders[family] if family else (),
        "head": LM_HEAD if family else (),
        "vision": VISION,
        "projector": projector_table(projector, layout),
    }
    root = "transformer." if family == "qwen" else "model."
    entries = []
    for section, table_of_section in sections.items():
        prefix = getattr(variant, section)
        if prefix is not None:
            prefix = prefix.replace("{root}", root)
            entries += [e._replace(hf=prefix + e.hf) for e in table_of_section]
    return tuple(entries)
