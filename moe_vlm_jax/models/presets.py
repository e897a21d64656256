"""Known towers and language models as configs.

Sizes of the published models are those of their config.json files. A MoE-LLaVA model is a tower, a language model and
four experts in every second layer; `vlm` puts the three together.
"""

from moe_vlm_jax import config as config_lib


def clip_l_336() -> config_lib.VisionConfig:
    """openai/clip-vit-large-patch14-336, read at its second-last block without the class token: 576 tokens."""
    return config_lib.VisionConfig(
        image_size=336,
        patch_size=14,
        embed_dim=1024,
        mlp_dim=4096,
        num_layers=24,
        num_heads=16,
        norm_eps=1e-5,
        activation="quick_gelu",
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        select_layer=-2,
        skip_tokens=1,
    )


def siglip_so400m_384() -> config_lib.VisionConfig:
    """google/siglip-so400m-patch14-384: 27 x 27 patches.

    MoE-LLaVA drops the first of them, taking it for a class token, so its checkpoints expect 728 tokens.
    """
    return config_lib.VisionConfig(
        image_size=384,
        patch_size=14,
        embed_dim=1152,
        mlp_dim=4304,
        num_layers=27,
        num_heads=16,
        norm_eps=1e-6,
        activation="gelu_tanh",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        select_layer=-2,
        skip_tokens=1,
    )


def phi2() -> config_lib.DecoderConfig:
    """microsoft/phi-2 as LLaVA-Phi uses it: without the bias of its head."""
    return config_lib.DecoderConfig(
        vocab_size=51200,
        embed_dim=2560,
        mlp_dim=10240,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=80,
        rotary_dim=32,
        rope_theta=10000.0,
        max_positions=2048,
        norm="layernorm",
        norm_eps=1e-5,
        parallel_block=True,
        gated_mlp=False,
        activation="gelu_tanh",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        lm_head_bias=False,
        residual_dropout=0.1,
    )


def stablelm_2_1_6b() -> config_lib.DecoderConfig:
    """stabilityai/stablelm-2-1_6b."""
    return config_lib.DecoderConfig(
        vocab_size=100352,
        embed_dim=2048,
        mlp_dim=5632,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        rotary_dim=16,
        rope_theta=10000.0,
        max_positions=4096,
        norm="layernorm",
        norm_eps=1e-5,
        parallel_block=False,
        gated_mlp=True,
        activation="silu",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
    )


def qwen_1_8b() -> config_lib.DecoderConfig:
    """Qwen/Qwen-1_8B; longer rows than 8192 would need its NTK scaling, which is not built."""
    return config_lib.DecoderConfig(
        vocab_size=151936,
        embed_dim=2048,
        mlp_dim=5504,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        rotary_dim=128,
        rope_theta=10000.0,
        max_positions=8192,
        norm="rmsnorm",
        norm_eps=1e-6,
        parallel_block=False,
        gated_mlp=True,
        activation="silu",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
    )


def vlm(vision: config_lib.VisionConfig, decoder: config_lib.DecoderConfig) -> config_lib.ModelConfig:
    """Returns the paper's model of these two: two-layer projector, four experts, two of them per token."""
    return config_lib.ModelConfig(
        vision=vision,
        projector="mlp2x_gelu",
        decoder=decoder,
        moe=config_lib.MoEConfig(placement="sparse", num_experts=(4,), top_k=2, balance_coef=0.01),
        compute_dtype="bfloat16",
        remat="full",
    )


def tiny(vocab_size: int) -> config_lib.ModelConfig:
    """About a million parameters: learns the mini infographics from nothing in minutes on two CPU cores.

    64 x 64 pixels in 4 patches, the cells of the charts' grid, so that no fact is split over two patches. Embeddings
    and positions start large: at 0.02 they drown beside the blocks' outputs, and nothing that depends on them is
    learned in the time there is. Tower and decoder are a small SigLIP and a small Mistral: HF's layout can hold them.
    """
    return config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            image_size=64,
            patch_size=32,
            embed_dim=128,
            mlp_dim=256,
            num_layers=2,
            num_heads=4,
            norm_eps=1e-6,
            activation="gelu_tanh",
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            select_layer=-1,
            skip_tokens=0,
            position_init_std=0.5,
        ),
        projector="mlp2x_gelu",
        decoder=config_lib.DecoderConfig(
            vocab_size=vocab_size,
            embed_dim=128,
            mlp_dim=192,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            rotary_dim=32,
            max_positions=512,
            norm="rmsnorm",
            norm_eps=1e-6,
            parallel_block=False,
            gated_mlp=True,
            activation="silu",
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            embed_init_std=0.5,
        ),
        moe=config_lib.MoEConfig(placement="sparse", num_experts=(4,), top_k=2, balance_coef=0.01),
        compute_dtype="float32",
        param_dtype="float32",
        remat="none",
    )


# Names of the released models: -384 reads 384 pixels with SigLIP, the others 336 with CLIP.
MOE_LLAVA = ("phi2-4e", "stablelm-4e", "qwen-4e", "phi2-4e-384", "stablelm-4e-384", "qwen-4e-384")


def moe_llava(name: str) -> tuple[config_lib.ModelConfig, str]:
    """Returns the model of one of MOE_LLAVA and the name of its conversation template."""
    decoder, template = {
        "phi2-4e": (phi2, "phi"),
        "stablelm-4e": (stablelm_2_1_6b, "stablelm"),
        "qwen-4e": (qwen_1_8b, "qwen"),
    }[name.removesuffix("-384")]
    tower = siglip_so400m_384() if name.endswith("-384") else clip_l_336()
    return vlm(tower, decoder()), template
