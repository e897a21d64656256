"""Adapters to PEFT and back, against PEFT itself on tiny random checkpoints; A and B are both random.

Tolerance: float32 sums in another order, 1e-5 of the largest logit (or of 1).
"""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import adapter_readers, adapters, configs, load
from moe_vlm_jax.models import adapters as targets
from moe_vlm_jax.models import vlm
from tests.hf import tiny
from tests.models import hf_parity_test as parity

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 13))
FINGERPRINT = "0123456789abcdef"


def lora_config(**changes) -> config_lib.LoraConfig:
    settings = {"rank": 5, "alpha": 7.0, "dropout": 0.15, "init": "gaussian", "targets": targets.ALL_LINEAR}
    return config_lib.LoraConfig(**{**settings, **changes})


def model_config(
    folder: pathlib.Path, lora: config_lib.LoraConfig
) -> tuple[config_lib.ModelConfig, configs.Checkpoint]:
    info = configs.read(folder)
    vision = info.config.vision if info.layout == "llava" else parity.NO_VISION
    return dataclasses.replace(info.config, compute_dtype="float32", vision=vision, lora=lora), info


def build(folder: pathlib.Path, config: config_lib.ModelConfig, leaves: dict[str, np.ndarray] | None = None):
    """Returns (graphdef, params): a checkpoint with adapters, given or random; what is not in the checkpoint is 0."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    base, factors = targets.split(abstract)
    held = set(configs.read(folder).sections)
    wanted = nnx.from_flat_state([(path, v) for path, v in nnx.to_flat_state(base) if path[0] in held])
    loaded = {path: v.get_value() for path, v in tree.leaves(load.load_into(wanted, folder, config).state).items()}
    rng = np.random.default_rng(3)
    draw = {path: 0.3 * rng.normal(size=v.get_value().shape) for path, v in tree.leaves(factors).items()}
    filled = {**loaded, **draw, **(leaves or {})}
    pairs = nnx.to_flat_state(abstract)
    values = {path: filled.get("/".join(map(str, path)), np.zeros(v.get_value().shape)) for path, v in pairs}
    return graphdef, nnx.from_flat_state(
        [(path, v.replace(jnp.asarray(values[path], jnp.float32))) for path, v in pairs]
    )


def logits(graphdef: nnx.GraphDef, params: nnx.State) -> np.ndarray:
    return np.asarray(parity.run(nnx.merge(graphdef, params), parity.text_batch(TOKENS))[2])


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def trained(params: nnx.State, *also: str) -> dict[str, np.ndarray]:
    """Returns the leaves of the adapters, and of what else is named by a pattern."""
    pattern = "|".join([targets.PATHS, *also])
    return {p: np.asarray(v.get_value()) for p, v in tree.leaves(params).items() if re.fullmatch(pattern, p)}


def write(folder, params, config, info, *also: str, **changes):
    settings = {"layout": info.layout, "base": info, "source": "the/base", "fingerprint": FINGERPRINT}
    return adapters.write_adapter(folder, trained(params, *also), config, **{**settings, **changes})


def read(folder, base: pathlib.Path, fingerprint: str = FINGERPRINT):
    """Returns the config with the folder's settings, and the adapter."""
    config, info = model_config(base, config_lib.LoraConfig())
    where = {"layout": info.layout, "base": info}
    config = dataclasses.replace(config, lora=adapter_readers.read_config(folder, config, **where))
    return config, adapter_readers.load_adapter(folder, config, base_fingerprint=fingerprint, **where)


OURS = {
    "phi": lora_config(rslora=True),
    "llama": lora_config(rank=3),
    "qwen2": lora_config(targets=targets.QKV, init="kaiming"),
    "mixtral": lora_config(rank=2, targets=(*targets.QKV, *targets.EXPERTS)),
    "llava": lora_config(rank=4, targets=(r"decoder/.*/attention/(q|o)", "projector/.*", "decoder/lm_head")),
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_reads_our_adapter_and_gives_our_logits(kind, tmp_path):
    theirs = tiny.save(kind, tmp_path / "base")
    before = their_logits(theirs)
    config, info = model_config(tmp_path / "base", OURS[kind])
    graphdef, params = build(tmp_path / "base", config)
    write(tmp_path / "adapter", params, config, info)
    ours = logits(graphdef, params)
    assert np.abs(ours - before).max() > 0.1
    parity.assert_close(ours, their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("part", ["gate", "(gate|up)", "(up|down)"])
def test_some_of_the_expert_layers_may_have_adapters(part, rslora, tmp_path):
    theirs = tiny.save("mixtral", tmp_path / "base")
    lora = lora_config(targets=(rf"decoder/.*/experts/{part}",), rslora=rslora)
    config, info = model_config(tmp_path / "base", lora)
    graphdef, params = build(tmp_path / "base", config)
    write(tmp_path / "adapter", params, config, info)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    parity.assert_close(logits(graphdef, params), their_logits(model))


def test_router_that_trained_in_full_is_a_module_to_save(tmp_path):
    theirs = tiny.save("mixtral", tmp_path / "base")
    config, info = model_config(tmp_path / "base", lora_config(targets=targets.EXPERTS, rslora=True))
    graphdef, params = build(tmp_path / "base", config)
    router = "decoder/groups/0/blocks/0/moe/router/kernel"
    moved = {router: -trained(params, router)[router]}
    params = adapter_readers.placed(params, moved)
    write(tmp_path / "adapter", params, config, info, router)
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert raw["modules_to_save"] == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    ours = logits(graphdef, params)
    parity.assert_close(ours, their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()))
    _, again = read(tmp_path / "adapter", tmp_path / "base")
    for path, array in trained(params, router).items():
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


def of_peft(folder: pathlib.Path, model, **settings):
    """Returns PEFT's model with random factors, saved into the folder."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_we_read_an_adapter_of_peft_and_give_its_logits(kind, tmp_path):
    theirs = tiny.save(kind.partition("-")[0], tmp_path / "base")
    before = their_logits(theirs)
    expected = their_logits(of_peft(tmp_path / "adapter", theirs, **THEIRS[kind]))
    config, adapter = read(tmp_path / "adapter", tmp_path / "base")
    ours = logits(*build(tmp_path / "base", config, adapter.leaves))
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
    of_peft(tmp_path / "adapter", theirs, **THEIRS[kind])
    config, adapter = read(tmp_path / "adapter", tmp_path / "base")
    _, params = build(tmp_path / "base", config, adapter.leaves)
    write(tmp_path / "again", params, config, configs.read(tmp_path / "base"), "decoder/.*/router/kernel")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert set(old) == set(new)
    for name, tensor in old.items():
        assert torch.equal(new[name], tensor), name


@pytest.mark.parametrize("kind", OURS)
def test_our_adapter_comes_back_bit_equal_with_its_settings(kind, tmp_path):
    tiny.save(kind, tmp_path / "base")
    config, info = model_config(tmp_path / "base", OURS[kind])
    _, params = build(tmp_path / "base", config)
    write(tmp_path / "adapter", params, config, info)
    again, adapter = read(tmp_path / "adapter", tmp_path / "base")
    assert again.lora == config.lora
    assert adapter.notes == ()
    assert set(adapter.leaves) == set(trained(params))
    for path, array in trained(params).items():
        np.testing.assert_array_equal(adapter.leaves[path], array)
    # Without adapter_base.json only the dropout, which PEFT lacks beside stacked experts, and the patterns are lost.
    (tmp_path / "adapter/adapter_base.json").unlink()
    again, adapter = read(tmp_path / "adapter", tmp_path / "base")
    kept = {"targets": config.lora.targets, "dropout": config.lora.dropout}
    assert dataclasses.replace(again.lora, **kept) == config.lora
    assert again.lora.dropout == (0.0 if kind == "mixtral" else config.lora.dropout)
    for path, array in trained(params).items():
        np.testing.assert_array_equal(adapter.leaves[path], array)


def test_adapter_of_the_linears_of_transformers_4_is_read(tmp_path):
    """Mixtral's experts as modules w1, w2, w3: one pair per expert, as PEFT wrote them beside transformers 4."""
    theirs = tiny.save("mixtral", tmp_path / "base")
    config, _ = model_config(tmp_path / "base", lora_config(targets=targets.EXPERTS, rank=3))
    graphdef, params = build(tmp_path / "base", config)
    old = tmp_path / "old"
    old.mkdir()
    tensors = {}
    for mine, name in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        for side in "ab":
            leaf = trained(params)[f"decoder/groups/0/blocks/0/moe/experts/{mine}/lora_{side}"]
            for layer, expert in np.ndindex(*leaf.shape[:2]):
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{key}.lora_{side.upper()}.weight"] = torch.tensor(leaf[layer, expert].T.copy())
    save_file(tensors, old / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["w1", "w2", "w3"]}
    (old / "adapter_config.json").write_text(json.dumps(raw))
    _, adapter = read(old, tmp_path / "base")
    for path, array in trained(params).items():
        np.testing.assert_array_equal(adapter.leaves[path], array)
    parity.assert_close(logits(graphdef, params), their_logits(peft.PeftModel.from_pretrained(theirs, old).eval()))


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
        lora=lora_config(rank=3, targets=expert_targets),
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
        tmp_path / "adapter", draws, config, layout="moe_llava", base=info, source="base", fingerprint=FINGERPRINT
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
        tmp_path / "adapter", config, layout="moe_llava", base=info, base_fingerprint=FINGERPRINT
    )
    for path, array in draws.items():
        np.testing.assert_array_equal(adapter.leaves[path], array)


# What is refused.


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> pathlib.Path:
    """An adapter of ours for `base`."""
    config, info = model_config(base, lora_config(targets=targets.QKV))
    _, params = build(base, config)
    write(tmp_path / "adapter", params, config, info)
    return tmp_path / "adapter"


def test_another_base_is_refused(folder, base):
    with pytest.raises(
        ValueError, match=f"fingerprint {FINGERPRINT} .the/base., but this one has feed; load that base"
    ):
        read(folder, base, "feed")


UNSUPPORTED = [
    ({"use_dora": True}, "use_dora=True is not implemented"),
    ({"bias": "lora_only"}, "bias='lora_only' is not implemented, only 'none'"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA' is not implemented"),
    ({"lora_bias": True}, "lora_bias=True is not implemented"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"shiny": 3}, "field shiny=3 is unknown"),
    ({"target_parameters": ["experts.down_proj"], "peft_version": "0.19.0"}, "before PEFT 0.19.1 stacked experts"),
    ({"target_parameters": ["experts.down_proj"], "peft_version": None}, "before PEFT 0.19.1 stacked experts"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=lambda v: str(v)[:40])
def test_what_is_no_plain_lora_is_refused(changes, message, folder, base):
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, **changes, "megatron_config": {}}))
    with pytest.raises(ValueError, match=message) as error:
        read(folder, base)
    assert "megatron_config={} is not implemented" in str(error.value)


def test_missing_unknown_and_mis_shaped_tensors_come_in_one_error(folder, base):
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers"
    del tensors[f"{stem}.0.self_attn.q_proj.lora_B.weight"]
    for side in "AB":  # of both, only the config tells
        del tensors[f"{stem}.2.self_attn.v_proj.lora_{side}.weight"]
    tensors[f"{stem}.1.self_attn.k_proj.lora_A.weight"] = torch.zeros(4, 24)
    tensors[f"{stem}.1.self_attn.k_proj.lora_magnitude_vector"] = torch.zeros(20)
    tensors[f"{stem}.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(5, 24)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"3 tensor.s. missing: .*layers.0.self_attn.q_proj.lora_B.weight") as error:
        read(folder, base)
    text = str(error.value)
    assert "2.self_attn.v_proj.lora_A.weight" in text and "2.self_attn.v_proj.lora_B.weight" in text
    assert "2 tensor(s) unknown to this model" in text and "lora_magnitude_vector" in text
    assert "1 tensor(s) mis-shaped: model.layers.1.self_attn.k_proj.weight: the file has (4, 24)" in text


def test_adapter_of_the_router_is_refused(tmp_path):
    theirs = tiny.save("mixtral", tmp_path / "base")
    of_peft(tmp_path / "adapter", theirs, target_modules=["q_proj"], target_parameters=["gate.weight"])
    with pytest.raises(ValueError, match=r"6 tensor.s. unknown to this model: .*mlp.gate.lora_A.weight"):
        read(tmp_path / "adapter", tmp_path / "base")


def test_model_built_with_other_settings_is_refused(folder, base):
    for changes, message in (
        ({"rank": 4, "alpha": 5.6}, "its rank is 5, but lora.rank=4"),
        ({"alpha": 8.0}, r"its scale is 1.4, but lora.alpha=8, lora.rank=5 and lora.rslora=False give 1.6"),
        ({"targets": (r"decoder/.*/attention/(q|k)",)}, "adapts 1 layer.s. without lora in this model: .*attention/v"),
        ({"targets": (r"decoder/.*/attention/.",)}, "lacks 2 factor.s. of this model: .*attention/o/lora_a"),
    ):
        config, info = model_config(base, lora_config(**{"targets": targets.QKV, **changes}))
        with pytest.raises(ValueError, match=message):
            adapter_readers.load_adapter(folder, config, layout="lm", base=info, base_fingerprint=FINGERPRINT)


def test_writing_refuses_what_the_layout_cannot_hold(folder, base, tmp_path):
    config, info = model_config(base, lora_config(targets=(*targets.QKV, "projector/.*")))
    _, params = build(base, config)
    with pytest.raises(ValueError, match=r"4 parameter.s. without a name in this layout: projector/linears/0/lora_a"):
        write(tmp_path / "new", params, config, info)
    config, info = model_config(base, lora_config(targets=targets.QKV))
    _, params = build(base, config)
    with pytest.raises(ValueError, match=r"already holds adapter_config\.json"):
        write(folder, params, config, info)
    with pytest.raises(ValueError, match=r"3 parameter.s. not trained beside other parameters of the same module"):
        write(tmp_path / "new", params, config, info, "decoder/.*/o/kernel")
    some = dict(list(trained(params).items())[1:])
    with pytest.raises(ValueError, match=r"1 parameter.s. missing: .*attention/k/lora_a"):
        adapters.write_adapter(
            tmp_path / "new", some, config, layout="lm", base=info, source="", fingerprint=FINGERPRINT
        )
    assert not (tmp_path / "new").exists()
