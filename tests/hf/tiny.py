"""Tiny random checkpoints made by transformers, every config value different from transformers' default and from ours.

Every parameter is random, norms and biases too, so that a tensor in the wrong place shows.
"""

import pathlib

import torch
import transformers

_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 61}
_TOKENS = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}


def _rope(theta: float, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def phi() -> transformers.PreTrainedModel:
    """Grouped keys, exact GELU, 8 of 12 dims rotating."""
    return transformers.PhiForCausalLM(
        transformers.PhiConfig(
            **_SIZES,
            **_TOKENS,
            **_rope(300.0, partial_rotary_factor=0.7),
            num_attention_heads=2,
            num_key_value_heads=1,
            hidden_act="gelu",
            max_position_embeddings=33,
            layer_norm_eps=2e-2,
            embd_pdrop=0.1,
            resid_pdrop=0.2,
        )
    )


def stablelm() -> transformers.PreTrainedModel:
    """Tied, grouped keys, biases in q, k and v."""
    return transformers.StableLmForCausalLM(
        transformers.StableLmConfig(
            **_SIZES,
            **_TOKENS,
            **_rope(300.0, partial_rotary_factor=0.7),
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_act="gelu",
            max_position_embeddings=33,
            layer_norm_eps=2e-2,
            use_qkv_bias=True,
            tie_word_embeddings=True,
        )
    )


def qwen2() -> transformers.PreTrainedModel:
    """Tied, grouped keys, layers 1 and 2 with a sliding window of 20."""
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **_SIZES,
            **_TOKENS,
            **_rope(300.0),
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_act="gelu",
            max_position_embeddings=33,
            rms_norm_eps=2e-2,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=20,
            max_window_layers=1,
        )
    )


def llama() -> transformers.PreTrainedModel:
    """Tied, grouped keys, heads wider than hidden_size / heads, all biases."""
    return transformers.LlamaForCausalLM(_llama_config(tie_word_embeddings=True))


def mistral() -> transformers.PreTrainedModel:
    """A sliding window of 19, heads wider than hidden_size / heads."""
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **_SIZES,
            **_TOKENS,
            **_rope(300.0),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            hidden_act="gelu",
            max_position_embeddings=33,
            rms_norm_eps=2e-2,
            sliding_window=19,
        )
    )


def mixtral() -> transformers.PreTrainedModel:
    """Five experts in every layer, three a token, heads narrower than hidden_size / heads, a sliding window."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **_SIZES,
            **_TOKENS,
            **_rope(300.0),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            hidden_act="gelu",
            max_position_embeddings=33,
            rms_norm_eps=2e-2,
            sliding_window=19,
            num_local_experts=5,
            num_experts_per_tok=3,
            tie_word_embeddings=True,
        )
    )


def _llama_config(**more) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **_SIZES,
        **_TOKENS,
        **_rope(300.0),
        **more,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        hidden_act="gelu",
        max_position_embeddings=33,
        rms_norm_eps=2e-2,
        attention_bias=True,
        mlp_bias=True,
    )


_TOWER = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 21,
    "patch_size": 7,
    "hidden_act": "gelu",
    "layer_norm_eps": 2e-2,
}
_UNEVEN = {**_TOWER, "image_size": 23}


def clip() -> transformers.PreTrainedModel:
    """3 x 3 patches and a class token."""
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_TOWER, projection_dim=13))


def siglip() -> transformers.PreTrainedModel:
    """3 x 3 patches, without the pooling head; 2 pixels left over, as of 384 by 14."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_UNEVEN, vision_use_head=False))


def clip_whole() -> transformers.PreTrainedModel:
    """CLIP with its text tower, as the hub has it."""
    text = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config={**text, "vocab_size": 17}, vision_config=_TOWER, projection_dim=13)
    return transformers.CLIPModel(config)


def siglip_whole() -> transformers.PreTrainedModel:
    """SigLIP with its text tower and pooling head, as the hub has it."""
    text = {"hidden_size": 20, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(text_config={**text, "vocab_size": 17}, vision_config=_UNEVEN)
    return transformers.SiglipModel(config)


def llava() -> transformers.PreTrainedModel:
    """LLaVA-1.5 over `clip` and `llama` (untied), reading the third-last hidden state with its class token."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER),
        text_config=_llama_config(),
        image_token_index=60,
        image_seq_length=10,
        vision_feature_layer=-3,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


LANGUAGE_MODELS = {f.__name__: f for f in (phi, stablelm, qwen2, llama, mistral, mixtral)}
TOWERS = {f.__name__: f for f in (clip, siglip)}
WHOLE_TOWERS = {f.__name__: f for f in (clip_whole, siglip_whole)}
ALL = LANGUAGE_MODELS | TOWERS | WHOLE_TOWERS | {"llava": llava}


def build(kind: str) -> transformers.PreTrainedModel:
    """Returns a model of ALL in evaluation mode, all its parameters random."""
    model = ALL[kind]().eval()
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save(kind: str, folder: pathlib.Path, **options) -> transformers.PreTrainedModel:
    """Saves a model of ALL into a folder and returns it."""
    model = build(kind)
    model.save_pretrained(folder, **options)
    return model
