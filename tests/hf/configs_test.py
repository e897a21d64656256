"""config.json read: published files, transformers' defaults, and every setting that is not implemented."""

import dataclasses
import json

import pytest
import transformers

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import configs, describe
from moe_vlm_jax.models import presets

# The fields of the published config.json files (auto_map and generation fields left out here and there).
PHI2 = {
    "_name_or_path": "microsoft/phi-2",
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "vocab_size": 51200,
}
STABLELM = {
    "architectures": ["StableLmForCausalLM"],
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 4096,
    "model_type": "stablelm",
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0",
    "use_cache": True,
    "use_qkv_bias": True,
    "vocab_size": 100352,
}
QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
CLIP_TOWER = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP = {
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "model_type": "clip_text_model"},
    "text_config_dict": {"hidden_size": 768},
    "torch_dtype": "float32",
    "vision_config": {
        **CLIP_TOWER,
        "add_cross_attention": False,
        "attention_dropout": 0.0,
        "bad_words_ids": None,
        "chunk_size_feed_forward": 0,
        "do_sample": False,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "pruned_heads": {},
        "top_k": 50,
        "torchscript": False,
    },
    "vision_config_dict": CLIP_TOWER,
}
SIGLIP = {
    "architectures": ["SiglipModel"],
    "initializer_factor": 1.0,
    "model_type": "siglip",
    "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model"},
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {**CLIP_TOWER, "model_type": "clip_vision_model", "vocab_size": 32000},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
MM = {
    "mm_image_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "image_projector_type": "mlp2x_gelu",
    "model_type": "llava_phi",
}
MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "moe_layers_idx": [0, 2],
    "ep_size": 1,
    "top_k_experts": 2,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
    "train_modules": ["fc1"],
    "num_experts": [4, 4],
}
MOE_LLAVA = {**PHI2, **MM, "model_type": "moe_llava_phi", "num_hidden_layers": 4, "moe": MOE}


def read(tmp_path, raw, **options) -> configs.Checkpoint:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return configs.read(tmp_path, **options)


def test_published_language_models_give_the_presets(tmp_path):
    phi = read(tmp_path, PHI2).config.decoder
    assert phi == dataclasses.replace(presets.phi2(), lm_head_bias=True)
    assert read(tmp_path, STABLELM).config.decoder == presets.stablelm_2_1_6b()
    assert read(tmp_path, QWEN).config.decoder == presets.qwen_1_8b()


def test_published_towers_give_the_presets(tmp_path):
    assert read(tmp_path, CLIP).config.vision == presets.clip_l_336()
    # The preset is for MoE-LLaVA's checkpoints, which drop the first real patch.
    assert read(tmp_path, SIGLIP).config.vision == dataclasses.replace(presets.siglip_so400m_384(), skip_tokens=0)


def test_published_llava_has_a_tower_a_projector_and_a_vicuna(tmp_path):
    info = read(tmp_path, LLAVA)
    assert info.config.vision == presets.clip_l_336()
    assert info.config.projector == "mlp2x_gelu"
    decoder = info.config.decoder
    assert (decoder.embed_dim, decoder.mlp_dim, decoder.num_layers, decoder.vocab_size) == (4096, 11008, 32, 32064)
    assert (decoder.norm_eps, decoder.head_dim, decoder.rotary_dim) == (1e-5, 128, 128)


def test_siglip_in_the_references_checkpoint_loses_its_first_patch(tmp_path):
    raw = {**MOE_LLAVA, "mm_image_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": 1152}
    assert read(tmp_path, raw).config.vision == presets.siglip_so400m_384()
    assert read(tmp_path, raw).config.vision.num_tokens == 728


def test_experts_of_the_reference_are_read(tmp_path):
    raw = {**MOE_LLAVA, "moe": {**MOE, "moe_layers_idx": [1, 3], "num_experts": [3, 5], "top_k_experts": 1}}
    config = read(tmp_path, raw).config
    assert config.layer_experts == (0, 3, 0, 5)
    assert config.moe.top_k == 1 and config.moe.capacity_factor == 1.5 and config.moe.eval_capacity_factor == 2.0
    assert not config.decoder.lm_head_bias
    assert read(tmp_path, MOE_LLAVA).config.moe.layers == ()  # what the mode already says is not repeated


@pytest.mark.parametrize(
    "cls",
    [
        transformers.PhiConfig,
        transformers.StableLmConfig,
        transformers.Qwen2Config,
        transformers.LlamaConfig,
        transformers.MixtralConfig,
        transformers.MistralConfig,
        transformers.CLIPVisionConfig,
        transformers.SiglipVisionConfig,
    ],
)
def test_absent_fields_take_the_defaults_of_transformers(cls, tmp_path):
    cls().save_pretrained(tmp_path)
    full = configs.read(tmp_path).config
    assert read(tmp_path, {"model_type": cls.model_type}).config == full


def test_absent_fields_without_known_default_are_named(tmp_path):
    raw = {name: value for name, value in QWEN.items() if name not in ("kv_channels", "vocab_size")}
    with pytest.raises(ValueError, match="kv_channels is missing") as error:
        read(tmp_path, raw)
    assert "vocab_size is missing" in str(error.value)


NOT_IMPLEMENTED = [
    ({"model_type": "mixtral"}, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 gives the one chosen expert"),
    ({"model_type": "mixtral"}, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not implemented"),
    (PHI2, {"qk_layernorm": True}, "qk_layernorm=True is not implemented"),
    (PHI2, {"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not implemented"),
    (PHI2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not implemented"),
    (PHI2, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope type 'yarn' is not implemented"),
    (PHI2, {"rope_parameters": {"rope_theta": 1.0, "beta": 2}}, r"rope_parameters has unknown \['beta'\]"),
    (PHI2, {"hidden_act": "relu"}, "activation 'relu' is unknown"),
    (PHI2, {"tie_word_embeddings": True}, "tie_word_embeddings=True with a bias in lm_head"),
    (PHI2, {"sliding_window": 7}, "field sliding_window=7 is unknown"),
    (PHI2, {"quantization_config": {"load_in_4bit": True}}, "quantization_config=.* is not implemented"),
    (PHI2, {"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported are phi, stablelm"),
    (STABLELM, {"use_parallel_residual": True}, "use_parallel_residual=True is not implemented"),
    (STABLELM, {"hidden_dropout": 0.2}, r"hidden_dropout=0\.2 is not implemented"),
    (QWEN, {"no_bias": False}, "no_bias=False is not implemented"),
    (QWEN, {"scale_attn_weights": False}, "scale_attn_weights=False is not implemented"),
    (
        CLIP,
        {"vision_config_dict": {"patch_size": 16}},
        r"vision_config_dict contradicts vision_config in \['patch_size'\]",
    ),
    (SIGLIP, {"vision_config": {"model_type": "dinov2"}}, "model_type='dinov2' is no vision tower"),
    (SIGLIP, {"vision_config": {"attention_dropout": 0.5}}, r"attention_dropout=0\.5 is not implemented"),
    (LLAVA, {"projector_hidden_act": "relu"}, "projector_hidden_act='relu' is not implemented"),
    (LLAVA, {"multimodal_projector_bias": False}, "multimodal_projector_bias=False is not implemented"),
    (LLAVA, {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer=\[-2, -5\] .* is not implemented"),
    (LLAVA, {"text_config": {"model_type": "gemma"}}, "model_type='gemma' is not supported"),
    (MOE_LLAVA, {"mm_use_im_start_end": True}, "mm_use_im_start_end=True is not implemented"),
    (MOE_LLAVA, {"mm_video_tower": "LanguageBind/Video"}, "mm_video_tower='LanguageBind/Video' is not implemented"),
    (MOE_LLAVA, {"image_projector_type": "qformer2_64"}, "image_projector_type: projector='qformer2_64' is unknown"),
    (MOE_LLAVA, {"mm_hidden_size": 768}, "mm_hidden_size=768 is not implemented; only 1024 is"),
    (MOE_LLAVA, {"mm_image_tower": "who/knows"}, "mm_image_tower='who/knows' is neither a folder .* `vision`"),
    (MOE_LLAVA, {"lora": {"lora_enable": True}}, "lora=.* is not implemented"),
    (MOE_LLAVA, {"moe": {**MOE, "moe_layers_idx": [0, 9]}}, r"moe_layers_idx=\[0, 9\] .* do not name layers below 4"),
    (MOE_LLAVA, {"moe": {**MOE, "num_experts": [4, 4, 4]}}, r"num_experts=\[4, 4, 4\] do not name layers"),
    (MOE_LLAVA, {"moe": {**MOE, "moe_mode": "odd"}}, "moe_mode='odd' is unknown"),
    (MOE_LLAVA, {"moe": {**MOE, "noisy_gate_policy": "RSample"}}, "field noisy_gate_policy='RSample' is unknown"),
]


@pytest.mark.parametrize(("raw", "changes", "message"), NOT_IMPLEMENTED, ids=lambda v: str(v)[:40])
def test_setting_that_is_not_implemented_is_an_error(raw, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {**raw, **changes})


def test_several_mistakes_come_in_one_error(tmp_path):
    raw = {**LLAVA, "projector_hidden_act": "relu", "text_config": {**LLAVA["text_config"], "attention_dropout": 0.1}}
    with pytest.raises(ValueError, match="projector_hidden_act='relu'") as error:
        read(tmp_path, {**raw, "vision_config": {**LLAVA["vision_config"], "shiny": 3}})
    assert "attention_dropout=0.1" in str(error.value) and "field shiny=3 is unknown" in str(error.value)


def test_unknown_field_is_an_error_unless_off_or_accepted(tmp_path):
    with pytest.raises(ValueError, match=r"field temper=1.5 is unknown; .*accept=\('temper',\), --accept temper"):
        read(tmp_path, {**PHI2, "temper": 1.5})
    assert any(
        "temper=1.5 accepted unread" in n for n in read(tmp_path, {**PHI2, "temper": 1.5}, accept=["temper"]).notes
    )
    assert any("temper=None is off" in note for note in read(tmp_path, {**PHI2, "temper": None}).notes)


def test_window_and_scaling_beyond_a_length_cut_the_length(tmp_path):
    mistral = {"model_type": "mistral", "max_position_embeddings": 500}
    assert read(tmp_path, {**mistral, "sliding_window": None}).config.decoder.max_positions == 500
    info = read(tmp_path, {**mistral, "sliding_window": 40})
    assert info.config.decoder.max_positions == 40
    assert any("max_positions is 40, by sliding_window, instead of 500" in note for note in info.notes)
    qwen2 = {"model_type": "qwen2", "max_position_embeddings": 500, "sliding_window": 40}
    assert read(tmp_path, {**qwen2, "use_sliding_window": False}).config.decoder.max_positions == 500
    assert read(tmp_path, {**qwen2, "use_sliding_window": True}).config.decoder.max_positions == 40
    longer = {**QWEN, "max_position_embeddings": 32768}
    assert read(tmp_path, longer).config.decoder.max_positions == 8192
    plain = {**longer, "use_dynamic_ntk": False, "use_logn_attn": False}
    assert read(tmp_path, plain).config.decoder.max_positions == 32768
    truncated = {**MOE_LLAVA, "tokenizer_model_max_length": 300}
    assert read(tmp_path, truncated).config.decoder.max_positions == 300


def test_joining_phi_with_a_tower_discards_the_bias_of_its_head_and_says_so(tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower/config.json").write_text(json.dumps(CLIP))
    info = read(tmp_path, PHI2, vision=tmp_path / "tower")
    assert info.config.decoder == presets.phi2() and info.config.vision == presets.clip_l_336()
    assert any("bias of Phi's lm_head is discarded" in note for note in info.notes)


def test_presets_are_described_as_the_reference_would(tmp_path):
    for decoder, kind in (
        (presets.phi2(), "phi"),
        (presets.stablelm_2_1_6b(), "stablelm"),
        (presets.qwen_1_8b(), "qwen1_5"),
    ):
        config = presets.vlm(presets.clip_l_336(), decoder)
        raw = describe.config_json(config, "moe_llava", base=None, dtype="bfloat16")
        assert raw["model_type"] == f"moe_llava_{kind}" and raw["torch_dtype"] == "bfloat16"
        assert raw["mm_image_tower"] == "openai/clip-vit-large-patch14-336" and "mm_vision_config" not in raw
        again = read(tmp_path, raw).config
        # No checkpoint records dropout; it belongs to training.
        assert again.layer_experts == config.layer_experts and again.vision == config.vision
        assert again.decoder == config.decoder


def test_experts_that_a_plain_language_model_cannot_have_are_refused():
    decoder = presets.phi2()
    for changes in ({"renormalize": False}, {"placement": "sparse"}, {"top_k": 1}, {"use_residual": True}):
        moe = dataclasses.replace(config_lib.MoEConfig(placement="dense", num_experts=(3,)), **changes)
        with pytest.raises(ValueError, match="layout 'lm' holds dense models and those with equal experts"):
            describe.config_json(config_lib.ModelConfig(decoder=decoder, moe=moe), "lm", base=None, dtype="float32")


def test_model_of_no_published_kind_is_refused_with_the_fields_that_differ():
    decoder = dataclasses.replace(presets.phi2(), norm="rmsnorm")
    config = config_lib.ModelConfig(decoder=decoder)
    with pytest.raises(ValueError, match=r"no model family of layout 'moe_llava' can express this decoder") as error:
        describe.config_json(config, "moe_llava", base=None, dtype="float32")
    assert "phi: config.decoder.norm='rmsnorm', but the checkpoint has 'layernorm'" in str(error.value)
