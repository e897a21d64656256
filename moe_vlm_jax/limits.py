"""What single fields of a config may hold: words and ranges, by dotted path; and the rule for fields without effect.

Rules between fields: validation.py and expert_rules.py.
"""

from collections.abc import Iterator

from moe_vlm_jax import config as config_lib

CHOICES = {
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "model.quant.kind": ("none", "nf4", "int4", "int8"),
    "model.lora.init": ("kaiming", "gaussian"),
    "optimizer.moments_dtype": ("float32", "bfloat16"),
    "model.vision.activation": ("quick_gelu", "gelu_tanh", "gelu"),
    "model.decoder.norm": ("layernorm", "rmsnorm"),
    "model.decoder.activation": ("gelu_tanh", "gelu", "silu"),
    "model.moe.placement": config_lib.PLACEMENTS,
    "model.moe.router": ("topk", "modality", "cluster"),
    "model.moe.dispatch": ("dropless", "capacity", "dense"),
    "model.moe.grouped_matmul": ("auto", "ragged", "blocks", "slots"),
    "model.moe.capacity_group": ("batch", "row"),
    "model.moe.expert_parallel": ("shard_map", "gspmd"),
    "data.source": ("embedded", "easy_vqa", "llava", "infographicvqa"),
    "data.difficulty": ("mini", "full"),
    "data.template": (
        *(
            "plain",
            "v0_plain",
            "plain_qa",
            "phi",
            "qwen",
            "stablelm",
            "v1",
            "vicuna_v1",
            "mistral",
            "minicpm",
            "openchat",
        ),
        *("llava_v1", "v1_mmtag", "default", "v0", "llava_v0", "v0_mmtag", "llama_2", "llava_llama_2", "llama", "mpt"),
        *("chatml", "llama_3"),
    ),
    "data.image_aspect": ("pad", "square"),
    "data.on_bad_sample": ("error", "drop"),
    "training.stgc.gradient": ("router", "full"),
    "preference.loss": ("none", "sigmoid", "robust", "sigmoid_norm", "hinge", "ipo", "kto_pair", "simpo", "orpo"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("cosine", "constant"),
}

# {(lowest, highest, whether the lowest itself is allowed): {section: fields}}; None: no limit. Tuples: each element.
RANGES: dict[tuple[float | None, float | None, bool], dict[str, str]] = {
    (1, None, True): {
        "model": "scan_unroll",
        "model.vision": "image_size patch_size embed_dim mlp_dim num_layers num_heads",
        "model.decoder": "embed_dim mlp_dim num_layers num_heads num_kv_heads head_dim max_positions",
        "model.moe": "num_experts top_k block_rows",
        "data": "max_text_tokens max_pixels max_branches row_lengths",
        "training": "batch_size accumulation log_every checkpoint_every keep_checkpoints",
        "generation": "max_new_tokens",
        "evaluation": "batch_size",
        "preference": "num_pairs",
        "mesh": "fsdp expert tensor",
    },
    (0, None, False): {
        "model.vision": "norm_eps",
        "model.decoder": "rope_theta norm_eps",
        "model.moe": "capacity_factor eval_capacity_factor",
        "model.lora": "alpha",
        "optimizer": "eps max_grad_norm",
        "training": "epochs",
        "generation": "repetition_penalty",
        "preference": "beta temperature",
    },
    (0, None, True): {
        "model.vision": "skip_tokens position_init_std",
        "model.decoder": "embed_init_std",
        "model.moe": "layers min_capacity balance_coef router_z_coef",
        "model.quant": "block",
        "model.lora": "rank",
        "data": "num_images images_per_row num_workers",
        "optimizer": "learning_rate muon_learning_rate weight_decay",
        "training": "max_steps loss_chunk checkpoint_seconds upcycling_noise routing_images_every",
        "training.stgc": "coefficient layers",
        "generation": "temperature top_k",
        "preference": "gamma sft_coef",
        "evaluation": "max_questions every_steps page_samples",
        "mesh": "data",
    },
    (2, None, True): {
        "model.decoder": "vocab_size rotary_dim",
    },
    (0, 0.999, True): {
        "model.decoder": "embed_dropout residual_dropout",
        "model.lora": "dropout",
        "preference": "held_out",
    },
    (0, 0.4999, True): {
        "preference": "label_smoothing",
    },
    (-1, 1, False): {
        "training.stgc": "threshold",
    },
    (0, 1, True): {
        "optimizer": "warmup_ratio final_ratio",
        "data": "wordy_share",
    },
    (0, 0.999999, True): {
        "optimizer": "b1 b2",
    },
    (0, 2147483647, True): {
        "training": "seed",
        "generation": "seed",
    },
    (0, 1, False): {
        "generation": "top_p",
        "preference": "top_p",
    },
}


def no_effect(section: object, prefix: str, names: str, reason: str) -> Iterator[str]:
    """Yields a mistake for each of the names whose value is not its default."""
    default = type(section)()
    for name in names.split():
        value, usual = getattr(section, name), getattr(default, name)
        if value != usual:
            yield f"{prefix}.{name}={value!r} has no effect {reason}; leave it at {usual!r}."
