"""Adapters to PEFT and back, against PEFT itself on tiny random checkpoints; A and B are both random.

Tolerance: float32 sums in another order, 1e-5 of the largest logit (or of 1).
"""

import dataclasses
import json
import pathlib
import re

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import adapter_readers, adapters, configs, load
from moe_vlm_jax.models import adapters as targets
from moe_vlm_jax.models import vlm
from tests.hf import adapter_examples as examples
from tests.hf import tiny
from tests.models import hf_parity_test as parity

OURS = {
    "phi": examples.lora_config(rslora=True),
    "llama": examples.lora_config(rank=3),
    "qwen2": examples.lora_config(targets=targets.QKV, init="kaiming"),
    "mixtral": examples.lora_config(rank=2, targets=(*targets.QKV, *targets.EXPERTS)),
    "llava": examples.lora_config(rank=4, targets=(r"decoder/.*/attention/(q|o)", "projector/.*", "decoder/lm_head")),
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_reads_our_adapter_and_gives_our_logits(kind, tmp_path):
    theirs = tiny.save(kind, tmp_path / "base")
    before = examples.their_logits(theirs)
    config, info = examples.model_config(tmp_path / "base", OURS[kind])
    graphdef, params = examples.build(tmp_path / "base", config)
    examples.write(tmp_path / "adapter", params, config, info)
    ours = examples.logits(graphdef, params)
    assert np.abs(ours - before).max() > 0.1
    parity.assert_close(
        ours, examples.their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval())
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("part", ["gate", "(gate|up)", "(up|down)"])
def test_some_of_the_expert_layers_may_have_adapters(part, rslora, tmp_path):
    theirs = tiny.save("mixtral", tmp_path / "base")
    lora = examples.lora_config(targets=(rf"decoder/.*/experts/{part}",), rslora=rslora)
    config, info = examples.model_config(tmp_path / "base", lora)
    graphdef, params = examples.build(tmp_path / "base", config)
    examples.write(tmp_path / "adapter", params, config, info)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    parity.assert_close(examples.logits(graphdef, params), examples.their_logits(model))


def test_router_that_trained_in_full_is_a_module_to_save(tmp_path):
    theirs = tiny.save("mixtral", tmp_path / "base")
    config, info = examples.model_config(tmp_path / "base", examples.lora_config(targets=targets.EXPERTS, rslora=True))
    graphdef, params = examples.build(tmp_path / "base", config)
    router = "decoder/groups/0/blocks/0/moe/router/kernel"
    moved = {router: -examples.trained(params, router)[router]}
    params = adapter_readers.placed(params, moved)
    examples.write(tmp_path / "adapter", params, config, info, router)
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert raw["modules_to_save"] == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    ours = examples.logits(graphdef, params)
    parity.assert_close(
        ours, examples.their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval())
    )
    _, again = examples.read(tmp_path / "adapter", tmp_path / "base")
    for path, array in examples.trained(params, router).items():
        np.testing.assert_array_equal(again.leaves[path], array)


THEIRS = {
    "phi": {"target_modules": ["q_proj", "dense", "fc1", "fc2"], "use_rslora": True},
    "qwen2": {"target_modules": r".*layers\.[02]\.self_attn\.[qkv]_proj"},
    "llama": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"o_proj": 13},
    },
    "mixtral": {
        "target_modules": ["k_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "modules_to_save": ["gate"],
        "use_rslora": True,
    },
}
# Of twice the rank, but not the two halves side by side that PEFT makes of the linears of transformers 4.
THEIRS["mixtral-wide"] = {**THEIRS["mixtral"], "rank_pattern": {r".*\.gate_up_proj": 8}}
NOTES = {
    "phi": (),
    "qwen2": ("3 matrices without an adapter in the folder: zeros",),
    "llama": ("of a rank below 4 padded", "another scale"),
    "mixtral": (),
    "mixtral-wide": ("of a rank below 8 padded", "another scale"),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_we_read_an_adapter_of_peft_and_give_its_logits(kind, tmp_path):
    theirs = tiny.save(kind.partition("-")[0], tmp_path / "base")
    before = examples.their_logits(theirs)
    expected = examples.their_logits(examples.of_peft(tmp_path / "adapter", theirs, **THEIRS[kind]))
    config, adapter = examples.read(tmp_path / "adapter", tmp_path / "base")
    ours = examples.logits(*examples.build(tmp_path / "base", config, adapter.leaves))
    assert np.abs(expected - before).max() > 0.1
    parity.assert_close(ours, expected)
    unchecked, *others = adapter.notes
    assert "does not say which base" in unchecked
    assert len(others) == len(NOTES[kind])
    for pattern, note in zip(NOTES[kind], others, strict=True):
        assert re.search(pattern, note)


@pytest.mark.parametrize("kind", ["phi", "mixtral"])
def test_an_adapter_of_peft_is_written_again_bit_equal(kind, tmp_path):
    theirs = tiny.save(kind, tmp_path / "base")
    examples.of_peft(tmp_path / "adapter", theirs, **THEIRS[kind])
    config, adapter = examples.read(tmp_path / "adapter", tmp_path / "base")
    _, params = examples.build(tmp_path / "base", config, adapter.leaves)
    examples.write(tmp_path / "again", params, config, configs.read(tmp_path / "base"), "decoder/.*/router/kernel")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert set(old) == set(new)
    for name, tensor in old.items():
        assert torch.equal(new[name], tensor), name


@pytest.mark.parametrize("kind", OURS)
def test_our_adapter_comes_back_bit_equal_with_its_settings(kind, tmp_path):
    tiny.save(kind, tmp_path / "base")
    config, info = examples.model_config(tmp_path / "base", OURS[kind])
    _, params = examples.build(tmp_path / "base", config)
    examples.write(tmp_path / "adapter", params, config, info)
    again, adapter = examples.read(tmp_path / "adapter", tmp_path / "base")
    assert again.lora == config.lora
    assert adapter.notes == ()
    assert set(adapter.leaves) == set(examples.trained(params))
    for path, array in examples.trained(params).items():
        np.testing.assert_array_equal(adapter.leaves[path], array)
    # Without adapter_base.json only the dropout, which PEFT lacks beside stacked experts, and the patterns are lost.
    (tmp_path / "adapter/adapter_base.json").unlink()
    again, adapter = examples.read(tmp_path / "adapter", tmp_path / "base")
    kept = {"targets": config.lora.targets, "dropout": config.lora.dropout}
    assert dataclasses.replace(again.lora, **kept) == config.lora
    assert again.lora.dropout == (0.0 if kind == "mixtral" else config.lora.dropout)
    for path, array in examples.trained(params).items():
        np.testing.assert_array_equal(adapter.leaves[path], array)


def test_adapter_of_the_linears_of_transformers_4_is_read(tmp_path):
    """Mixtral's experts as modules w1, w2, w3: one pair per expert, as PEFT wrote them beside transformers 4."""
    theirs = tiny.save("mixtral", tmp_path / "base")
    config, _ = examples.model_config(tmp_path / "base", examples.lora_config(targets=targets.EXPERTS, rank=3))
    graphdef, params = examples.build(tmp_path / "base", config)
    old = tmp_path / "old"
    old.mkdir()
    tensors = {}
    for mine, name in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        for side in "ab":
            leaf = examples.trained(params)[f"decoder/groups/0/blocks/0/moe/experts/{mine}/lora_{side}"]
            for layer, expert in np.ndindex(*leaf.shape[:2]):
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{key}.lora_{side.upper()}.weight"] = torch.tensor(leaf[layer, expert].T.copy())
    save_file(tensors, old / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["w1", "w2", "w3"]}
    (old / "adapter_config.json").write_text(json.dumps(raw))
    _, adapter = examples.read(old, tmp_path / "base")
    for path, array in examples.trained(params).items():
        np.testing.assert_array_equal(adapter.leaves[path], array)
    parity.assert_close(
        examples.logits(graphdef, params), examples.their_logits(peft.PeftModel.from_pretrained(theirs, old).eval())
    )


# The reference's layout: one nn.Linear per expert.


def moe_llava_config(table: str) -> config_lib.ModelConfig:
    decoder = {"embed_dim": 12, "mlp_dim": 20, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "head_dim": 6}
    gated = {"norm": "rmsnorm", "parallel_block": False, "gated_mlp": True, "activation": "silu", "mlp_bias": False}
    kind = {} if table == "phi" else {**gated, "output_bias": False}
    config = config_lib.DecoderConfig(**decoder, **kind, vocab_size=37, rotary_dim=4 if table == "phi" else 6)
    moe = config_lib.MoEConfig(num_experts=(3,), use_residual=table == "phi")
    expert_targets = (r"decoder/.*/attention/(q|v)", r"decoder/.*/(experts|mlp)/(up|down)")
    return config_lib.ModelConfig(
        decoder=config,
        vision=parity.NO_VISION,
        projector="linear",
        moe=moe,
        lora=examples.lora_config(rank=3, targets=expert_targets),
    )


def qwen_base(folder: pathlib.Path, config: config_lib.ModelConfig) -> configs.Checkpoint:
    """Returns the description of a Qwen-1 checkpoint of the reference, whose q, k and v are one tensor."""
    from moe_vlm_jax.hf import describe, families

    info = configs.Checkpoint(
        folder, "lm", families.QWEN, config, frozenset({"decoder"}), {"model_type": "qwen"}, None, None, ()
    )
    raw = describe.config_json(config, "moe_llava", base=info, dtype="float32")
    assert raw["model_type"] == "moe_llava_qwen"
    return info


class Tree(torch.nn.Module):
    """Modules by their full names."""

    def __init__(self, linears: dict[str, torch.nn.Linear]):
        super().__init__()
        for name, linear in linears.items():
            parent: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            parent.add_module(leaf, linear)

    def prepare_inputs_for_generation(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("table", ["phi", "qwen"])
def test_every_expert_of_the_reference_gets_its_own_update_from_peft(table, tmp_path):
    config = moe_llava_config(table)
    info = qwen_base(tmp_path, config) if table == "qwen" else None
    abstract = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(5)
    wanted = rf"{targets.PATHS}|decoder/.*/router/kernel"
    draws = {
        path: rng.normal(size=spec.shape).astype(np.float32)
        for path, spec in load.state_specs(abstract).items()
        if re.fullmatch(wanted, path)
    }
    adapters.write_adapter(
        tmp_path / "adapter",
        draws,
        config,
        layout="moe_llava",
        base=info,
        source="base",
        fingerprint=examples.FINGERPRINT,
    )
    # Every linear of the model, adapted or not, under the reference's name.
    model = adapters.describe_model(config, "moe_llava", info)
    linears = {}
    for name, pieces in model.tables[0].items():
        if pieces[0].transform == "transpose":
            out_dim = sum(model.shapes[piece.path][-1] for piece in pieces)
            module, bias = name.removesuffix(".weight"), name.replace(".weight", ".bias") in model.tables[0]
            linears[module] = torch.nn.Linear(model.shapes[pieces[0].path][-2], out_dim, bias=bias)
    loaded = peft.PeftModel.from_pretrained(Tree(linears), tmp_path / "adapter")
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").numpy()
        for name, module in loaded.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    expected = {}
    for name, pieces in model.tables[0].items():
        blocks = []
        for piece in pieces:
            a, b = (draws.get(piece.path.replace("kernel", f"lora_{side}")) for side in "ab")
            zero = np.zeros(model.shapes[piece.path][len(piece.index) :], np.float32)
            blocks.append((zero if a is None else 7 / 3 * a[piece.index] @ b[piece.index]).T)
        if any(block.any() for block in blocks):
            expected[name.removesuffix(".weight")] = np.concatenate(blocks)
    assert set(deltas) == set(expected)
    assert sum("deepspeed_experts" in name for name in deltas) == 2 * 3 * 2
    for name, delta in expected.items():
        np.testing.assert_allclose(deltas[name], delta, atol=1e-5)
    gates = [name for name in linears if name.endswith("gate.wg")]
    assert len(gates) == 2
    for i, name in enumerate(gates):
        module = loaded.get_submodule(f"base_model.model.{name}").modules_to_save["default"]
        np.testing.assert_array_equal(module.weight.detach(), draws["decoder/groups/0/blocks/0/moe/router/kernel"][i].T)
    # And back, bit-equal.
    adapter = adapter_readers.load_adapter(
        tmp_path / "adapter", config, layout="moe_llava", base=info, base_fingerprint=examples.FINGERPRINT
    )
    for path, array in draws.items():
        np.testing.assert_array_equal(adapter.leaves[path], array)
