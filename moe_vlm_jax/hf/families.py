"""What each backbone's config.json means: its fields beside ours, what it implies, and what must not be set.

Data only; `hf/configs.py` reads it in both directions. Defaults are those of transformers' config classes, because a
config.json may leave fields out (a test compares them); where no installed class can vouch for a default, the field is
required.
"""

from typing import Any, NamedTuple

REQUIRED = object()


class Field(NamedTuple):
    """One field of config.json and the DecoderConfig or VisionConfig field that it sets."""

    hf: str
    ours: str
    default: Any = REQUIRED


class Family(NamedTuple):
    """One kind of language model.

    Attributes:
      model_type, architecture: of the plain language model.
      llava: infix of the reference's class and type names ('phi' -> llava_phi, moe_llava_phi), if it has one.
      llava_class: infix of the class names ('Phi' -> MoELLaVAPhiForCausalLM).
      table: key of `names.DECODERS`.
      fields: config.json fields that have a field of ours.
      fixed: what the family implies.
      must: field -> allowed values, the first being the default; anything else is not implemented.
      rotary: (field of the rotated share of a head or None, its default).
      theta: field of the rotary base, with its default.
      mlp_factor: intermediate_size / our mlp_dim.
      inert: fields of this family that do not change what is computed here.
      train_modules: what the reference's stage 3 trains, recorded in config.json.
      experts: (field of the number of experts, its default, field of the experts per token, its default) of a family
        whose every layer holds experts; None for a dense one.
    """

    model_type: str
    architecture: str
    llava: str | None
    llava_class: str | None
    table: str
    fields: tuple[Field, ...]
    fixed: dict[str, Any]
    must: dict[str, tuple[Any, ...]]
    rotary: tuple[str | None, Any] = (None, 1.0)
    theta: tuple[str, Any] = ("rope_theta", 10000.0)
    mlp_factor: int = 1
    inert: frozenset[str] = frozenset()
    train_modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj", "wg")
    experts: tuple[str, int, str, int] | None = None


def _sizes(vocab: Any, embed: Any, mlp: Any, layers: Any, heads: Any, positions: Any) -> tuple[Field, ...]:
    return (
        Field("vocab_size", "vocab_size", vocab),
        Field("hidden_size", "embed_dim", embed),
        Field("intermediate_size", "mlp_dim", mlp),
        Field("num_hidden_layers", "num_layers", layers),
        Field("num_attention_heads", "num_heads", heads),
        Field("max_position_embeddings", "max_positions", positions),
        Field("tie_word_embeddings", "tie_embeddings", False),
    )


_GATED = {"gated_mlp": True, "parallel_block": False, "lm_head_bias": False}
_RMS = {**_GATED, "norm": "rmsnorm"}

PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    llava="phi",
    llava_class="Phi",
    table="phi",
    fields=(
        *_sizes(51200, 2048, 8192, 24, 32, 2048),
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("layer_norm_eps", "norm_eps", 1e-5),
        Field("hidden_act", "activation", "gelu_new"),
        Field("embd_pdrop", "embed_dropout", 0.0),
        Field("resid_pdrop", "residual_dropout", 0.0),
    ),
    fixed={
        "norm": "layernorm",
        "parallel_block": True,
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,  # of the plain model only
    },
    must={"qk_layernorm": (False,), "attention_dropout": (0.0,)},
    rotary=("partial_rotary_factor", 0.5),
    train_modules=("fc1", "fc2", "wg"),
)

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    llava=None,
    llava_class=None,
    table="llama",
    fields=(
        *_sizes(50304, 2560, 6912, 32, 32, 4096),
        Field("num_key_value_heads", "num_kv_heads", 32),
        Field("layer_norm_eps", "norm_eps", 1e-5),
        Field("hidden_act", "activation", "silu"),
        Field("use_qkv_bias", "qkv_bias", False),
    ),
    fixed={**_GATED, "norm": "layernorm", "output_bias": False, "mlp_bias": False},
    must={
        "qk_layernorm": (False,),
        "use_parallel_residual": (False,),
        "attention_dropout": (0.0,),
        "hidden_dropout": (0.0,),
    },
    rotary=("partial_rotary_factor", 0.25),
)

# The same model under the names of its first release, which the reference kept.
STABLELM_EPOCH = STABLELM._replace(
    model_type="stablelm_epoch",
    architecture="StableLMEpochForCausalLM",
    llava="stablelm",
    llava_class="Stablelm",
    fields=(
        *_sizes(REQUIRED, REQUIRED, REQUIRED, REQUIRED, REQUIRED, REQUIRED),
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("norm_eps", "norm_eps"),
        Field("hidden_act", "activation"),
        Field("use_qkv_bias", "qkv_bias"),
    ),
    must={},
    rotary=("rope_pct", REQUIRED),
    theta=("rope_theta", REQUIRED),
)

QWEN = Family(
    model_type="qwen",
    architecture="QWenLMHeadModel",
    llava="qwen",
    llava_class="QWen",
    table="qwen",
    fields=(
        *_sizes(REQUIRED, REQUIRED, REQUIRED, REQUIRED, REQUIRED, REQUIRED),
        Field("kv_channels", "head_dim"),
        Field("layer_norm_epsilon", "norm_eps"),
        Field("emb_dropout_prob", "embed_dropout", 0.0),
    ),
    fixed={**_RMS, "activation": "silu", "qkv_bias": True, "output_bias": False, "mlp_bias": False},
    must={"attn_dropout_prob": (0.0,), "scale_attn_weights": (True,), "no_bias": (True,)},
    rotary=("rotary_pct", 1.0),
    theta=("rotary_emb_base", REQUIRED),
    mlp_factor=2,  # w1 and w2 have half of intermediate_size each
    inert=frozenset(
        {
            "bf16",
            "fp16",
            "fp32",
            "onnx_safe",
            "softmax_in_fp32",  # ours always is
            "use_cache_kernel",
            "use_cache_quantization",
            "use_flash_attn",
            # Both act beyond seq_length only, and max_positions is cut to it.
            "use_dynamic_ntk",
            "use_logn_attn",
        }
    ),
    train_modules=("mlp.w1", "mlp.w2", "mlp.c_proj", "wg"),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    llava="qwen1_5",
    llava_class="Qwen1_5",
    table="llama",
    fields=(
        *_sizes(151936, 4096, 22016, 32, 32, 32768),
        Field("num_key_value_heads", "num_kv_heads", 32),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu"),
    ),
    fixed={**_RMS, "qkv_bias": True, "output_bias": False, "mlp_bias": False},
    must={"attention_dropout": (0.0,)},
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    llava="llama",
    llava_class="Llama",
    table="llama",
    fields=(
        *_sizes(32000, 4096, 11008, 32, 32, 2048),
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu"),
        Field("attention_bias", "qkv_bias", False),
        Field("attention_bias", "output_bias", False),
        Field("mlp_bias", "mlp_bias", False),
    ),
    fixed=_RMS,
    must={"attention_dropout": (0.0,)},
    inert=frozenset({"pretraining_tp"}),  # splits the same products
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    llava="mistral",
    llava_class="Mistral",
    table="llama",
    fields=(
        *_sizes(32000, 4096, 14336, 32, 32, 131072),
        Field("num_key_value_heads", "num_kv_heads", 8),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu"),
    ),
    fixed={**_RMS, "qkv_bias": False, "output_bias": False, "mlp_bias": False},
    must={"attention_dropout": (0.0,)},
)

# Mistral with experts in every layer: softmax over all, the weights of the chosen ones sum to 1, nothing is dropped.
MIXTRAL = MISTRAL._replace(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    llava=None,
    llava_class=None,
    table="mixtral",
    fields=(
        *_sizes(32000, 4096, 14336, 32, 32, 131072),
        Field("num_key_value_heads", "num_kv_heads", 8),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("hidden_act", "activation", "silu"),
    ),
    must={"attention_dropout": (0.0,), "router_jitter_noise": (0.0,)},
    theta=("rope_theta", 1000000.0),
    # The balance loss counts otherwise than ours does (first choices): moe.balance_coef is the run's own choice.
    inert=frozenset({"output_router_logits", "router_aux_loss_coef"}),
    experts=("num_local_experts", 8, "num_experts_per_tok", 2),
)

# In the order in which a config without an original config.json is matched.
FAMILIES = (PHI, STABLELM, STABLELM_EPOCH, QWEN2, MISTRAL, LLAMA, QWEN, MIXTRAL)

# HF's name -> ours; the first of several is what is written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


class Tower(NamedTuple):
    """One kind of vision tower: model types (tower alone, whole model), fields and what the kind implies."""

    model_type: str
    parent: str
    architecture: str
    fields: tuple[Field, ...]
    fixed: dict[str, Any]


def _tower_fields(patch: int, activation: str, eps: float) -> tuple[Field, ...]:
    return (
        Field("hidden_size", "embed_dim", 768),
        Field("intermediate_size", "mlp_dim", 3072),
        Field("num_hidden_layers", "num_layers", 12),
        Field("num_attention_heads", "num_heads", 12),
        Field("image_size", "image_size", 224),
        Field("patch_size", "patch_size", patch),
        Field("hidden_act", "activation", activation),
        Field("layer_norm_eps", "norm_eps", eps),
    )


CLIP = Tower(
    model_type="clip_vision_model",
    parent="clip",
    architecture="CLIPVisionModel",
    fields=_tower_fields(32, "quick_gelu", 1e-5),
    fixed={"class_token": True, "pre_norm": True, "patch_bias": False, "skip_tokens": 1},
)
SIGLIP = Tower(
    model_type="siglip_vision_model",
    parent="siglip",
    architecture="SiglipVisionModel",
    fields=_tower_fields(16, "gelu_pytorch_tanh", 1e-6),
    fixed={"class_token": False, "pre_norm": False, "patch_bias": True, "skip_tokens": 0},
)
TOWERS = (CLIP, SIGLIP)
TOWER_MUST = {"attention_dropout": (0.0,), "dropout": (0.0,), "num_channels": (3,)}
TOWER_INERT = frozenset({"projection_dim", "vision_use_head", "vocab_size"})  # the last is in LLaVA-1.5's own

# Published towers that MoE-LLaVA's config.json only names; the weights come from the checkpoint.
KNOWN_TOWERS = {
    f"openai/clip-vit-large-patch14{suffix}": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": 14,
    }
    for suffix, size in {"-336": 336, "": 224}.items()
} | {
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}

# Fields of any config.json that do not change what is computed: bookkeeping, initialisation, generation defaults.
_INERT = """
_name_or_path _attn_implementation_autoset architectures auto_map bos_token_id dtype eos_token_id id2label
initializer_factor initializer_range is_composition label2id model_type pad_token_id problem_type
return_dict return_dict_in_generate sep_token_id tokenizer_class torch_dtype torchscript transformers_version
unk_token_id use_bfloat16 use_cache finetuning_task gradient_checkpointing prefix
task_specific_params tf_legacy_loss
chunk_size_feed_forward decoder_start_token_id is_decoder is_encoder_decoder output_attentions
output_hidden_states output_scores tie_encoder_decoder cross_attention_hidden_size
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
suppress_tokens temperature top_k top_p typical_p
"""
INERT = frozenset(_INERT.split())

# Set, these change the computation in ways that are not implemented.
MUST = {"add_cross_attention": (False,), "pruned_heads": ({},), "quantization_config": (None,), "lora": (None, {})}

# Fields that the reference adds. What matters of them is read by name in hf/configs.py.
_LLAVA_INERT = """
freeze_mm_mlp_adapter tune_mm_mlp_adapter mm_projector_lr mm_use_im_patch_token tokenizer_padding_side
image_aspect_ratio video_global_proj video_projector_type video_spatial_proj video_temproal_proj
mm_vision_config
"""
LLAVA_INERT = frozenset(_LLAVA_INERT.split())
MOE_INERT = frozenset({"moe_enable", "ep_size", "train_modules", "router_aux_loss_coef"})
