"""Adapters that a model cannot take are refused with all reasons at once, and so are ones that cannot be written."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_vlm_jax.hf import adapter_readers, adapters
from moe_vlm_jax.models import adapters as targets
from tests.hf import adapter_examples as examples
from tests.hf import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> pathlib.Path:
    """An adapter of ours for `base`."""
    config, info = examples.model_config(base, examples.lora_config(targets=targets.QKV))
    _, params = examples.build(base, config)
    examples.write(tmp_path / "adapter", params, config, info)
    return tmp_path / "adapter"


def test_another_base_is_refused(folder, base):
    with pytest.raises(
        ValueError, match=f"fingerprint {examples.FINGERPRINT} .the/base., but this one has feed; load that base"
    ):
        examples.read(folder, base, "feed")


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
        examples.read(folder, base)
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
        examples.read(folder, base)
    text = str(error.value)
    assert "2.self_attn.v_proj.lora_A.weight" in text and "2.self_attn.v_proj.lora_B.weight" in text
    assert "2 tensor(s) unknown to this model" in text and "lora_magnitude_vector" in text
    assert "1 tensor(s) mis-shaped: model.layers.1.self_attn.k_proj.weight: the file has (4, 24)" in text


def test_adapter_of_the_router_is_refused(tmp_path):
    theirs = tiny.save("mixtral", tmp_path / "base")
    examples.of_peft(tmp_path / "adapter", theirs, target_modules=["q_proj"], target_parameters=["gate.weight"])
    with pytest.raises(ValueError, match=r"6 tensor.s. unknown to this model: .*mlp.gate.lora_A.weight"):
        examples.read(tmp_path / "adapter", tmp_path / "base")


def test_model_built_with_other_settings_is_refused(folder, base):
    for changes, message in (
        ({"rank": 4, "alpha": 5.6}, "its rank is 5, but lora.rank=4"),
        ({"alpha": 8.0}, r"its scale is 1.4, but lora.alpha=8, lora.rank=5 and lora.rslora=False give 1.6"),
        ({"targets": (r"decoder/.*/attention/(q|k)",)}, "adapts 1 layer.s. without lora in this model: .*attention/v"),
        ({"targets": (r"decoder/.*/attention/.",)}, "lacks 2 factor.s. of this model: .*attention/o/lora_a"),
    ):
        config, info = examples.model_config(base, examples.lora_config(**{"targets": targets.QKV, **changes}))
        with pytest.raises(ValueError, match=message):
            adapter_readers.load_adapter(folder, config, layout="lm", base=info, base_fingerprint=examples.FINGERPRINT)


def test_writing_refuses_what_the_layout_cannot_hold(folder, base, tmp_path):
    config, info = examples.model_config(base, examples.lora_config(targets=(*targets.QKV, "projector/.*")))
    _, params = examples.build(base, config)
    with pytest.raises(ValueError, match=r"4 parameter.s. without a name in this layout: projector/linears/0/lora_a"):
        examples.write(tmp_path / "new", params, config, info)
    config, info = examples.model_config(base, examples.lora_config(targets=targets.QKV))
    _, params = examples.build(base, config)
    with pytest.raises(ValueError, match=r"already holds adapter_config\.json"):
        examples.write(folder, params, config, info)
    with pytest.raises(ValueError, match=r"3 parameter.s. not trained beside other parameters of the same module"):
        examples.write(tmp_path / "new", params, config, info, "decoder/.*/o/kernel")
    some = dict(list(examples.trained(params).items())[1:])
    with pytest.raises(ValueError, match=r"1 parameter.s. missing: .*attention/k/lora_a"):
        adapters.write_adapter(
            tmp_path / "new", some, config, layout="lm", base=info, source="", fingerprint=examples.FINGERPRINT
        )
    assert not (tmp_path / "new").exists()
