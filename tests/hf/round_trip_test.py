"""HF -> ours -> HF gives the same tensors, bit for bit, and folders that transformers and we read again."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from moe_vlm_jax.hf import configs, load, plans, readers, writers
from moe_vlm_jax.models import vlm
from tests import conftest
from tests.hf import tiny

GOLDEN_MODELS = sorted(path.parent for path in (conftest.goldens_folder() / "models").glob("*/checkpoint"))
TOWERS = conftest.goldens_folder() / "vision_tower"
SECTIONS = {"lm": {"decoder"}, "vision": {"vision"}}


def read_params(folder, **options) -> tuple[configs.Checkpoint, dict[str, np.ndarray], plans.Report]:
    """Returns what a folder holds, its parameters in the checkpoint's own dtypes, and the report."""
    info = configs.read(folder, vision=options.get("vision"))
    state = nnx.state(nnx.eval_shape(lambda: vlm.VLM(info.config, rngs=nnx.Rngs(0))))
    sections = SECTIONS.get(info.layout, {"decoder", "vision", "projector"})
    specs = {path: spec for path, spec in load.state_specs(state).items() if path.split("/")[0] in sections}
    params, report = load.load_params(folder, specs, info.config, dtype="source", **options)
    return info, params, report


def assert_same_tensors(folder: pathlib.Path, original: pathlib.Path, *, renamed: str = "") -> None:
    """Every tensor of `folder` equals the original's in name, dtype and bytes, and none is lacking."""
    ours, theirs = readers.open_checkpoint(folder), readers.open_checkpoint(original)
    assert set(ours) == {name.removeprefix(renamed) for name in theirs}
    for name, tensor in theirs.items():
        mine = ours[name.removeprefix(renamed)]
        assert mine.dtype == tensor.dtype
        np.testing.assert_array_equal(mine.read().view(np.uint8), np.ascontiguousarray(tensor.read()).view(np.uint8))


@pytest.mark.goldens
@pytest.mark.parametrize("folder", GOLDEN_MODELS, ids=lambda path: path.name)
def test_reference_checkpoint_comes_back_as_the_same_file(folder, tmp_path):
    """Tower tensors are read from the checkpoint itself: the golden folder names the tower, beside a copy of it."""
    source = tmp_path / "moe_llava"
    source.mkdir()
    raw = json.loads((folder / "checkpoint/config.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((folder / "checkpoint" / name).read_bytes())
    beside = source / raw["mm_image_tower"]
    beside.mkdir(parents=True)
    (beside / "config.json").write_bytes((TOWERS / raw["mm_image_tower"] / "config.json").read_bytes())

    info, params, report = read_params(source)
    assert report.not_taken == report.ignored == []
    written = writers.write(tmp_path / "out", params, info.config, layout="moe_llava", base=info)

    assert (tmp_path / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    out = json.loads((tmp_path / "out/config.json").read_text())
    assert out.pop("mm_vision_config")["hidden_size"] == info.config.vision.embed_dim
    assert out == raw
    saved = json.loads((folder / "params.json").read_text())["saved_state_dict"]
    shapes = {name: ["torch." + str(dtype), list(shape)] for name, (shape, dtype) in written.tensors.items()}
    assert shapes == saved
    again, reread, _ = read_params(tmp_path / "out")
    assert again.config == info.config
    for path, array in params.items():
        np.testing.assert_array_equal(reread[path], array)


@pytest.mark.goldens
@pytest.mark.parametrize("folder", GOLDEN_MODELS, ids=lambda path: path.name)
def test_model_without_its_original_config_is_described_alike(folder, tmp_path):
    """From our config alone, the reference's fields come out with the same values."""
    tower = json.loads((folder / "checkpoint/config.json").read_text())["mm_image_tower"]
    info, params, _ = read_params(folder / "checkpoint", vision=TOWERS / tower)
    writers.write(tmp_path / "out", params, info.config, layout="moe_llava")
    again = configs.read(tmp_path / "out")
    assert again.config == info.config
    out = json.loads((tmp_path / "out/config.json").read_text())
    # An RMS-normalised gated model with biases in q, k and v is Qwen2's kind as much as Qwen-1's; the newer is chosen.
    if out["model_type"] == info.raw["model_type"]:
        moe = dict(info.raw["moe"], moe_mode=out["moe"]["moe_mode"])
        assert out["moe"] == moe
        assert_same_tensors(tmp_path / "out", folder / "checkpoint")
    else:
        assert (info.raw["model_type"], out["model_type"]) == ("moe_llava_qwen", "moe_llava_qwen1_5")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", tiny.LANGUAGE_MODELS)
def test_language_model_comes_back_bit_equal_and_transformers_reads_it(kind, dtype, tmp_path):
    model = tiny.build(kind).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB" if dtype == "bfloat16" else "5GB")
    info, params, report = read_params(tmp_path / "in")
    assert info.layout == "lm" and not report.casts
    sharded = {"max_shard_bytes": 20_000} if dtype == "bfloat16" else {}
    written = writers.write(tmp_path / "out", params, info.config, layout="lm", base=info, **sharded)
    assert_same_tensors(tmp_path / "out", tmp_path / "in")
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (dtype == "bfloat16")
    assert sum(readers.open_checkpoint(tmp_path / "out")[n].read().nbytes for n in written.tensors) == written.bytes
    again, loading = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(value.dtype), value), name
    assert again.dtype == model.dtype


@pytest.mark.parametrize("kind", [*tiny.TOWERS, *tiny.WHOLE_TOWERS])
def test_tower_comes_back_bit_equal_and_transformers_reads_it(kind, tmp_path):
    model = tiny.save(kind, tmp_path / "in")
    info, params, report = read_params(tmp_path / "in")
    writers.write(tmp_path / "out", params, info.config, layout="vision", base=info)
    kind_class = transformers.SiglipVisionModel if kind.startswith("siglip") else transformers.CLIPVisionModel
    again, loading = kind_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    theirs = getattr(model, "vision_model", model).state_dict()
    held = {name for name in theirs if not name.startswith("head.") and not name.endswith("position_ids")}
    assert set(again.state_dict()) - {"embeddings.position_ids"} == held
    for name in held:
        assert torch.equal(again.state_dict()[name], theirs[name]), name
    if kind in tiny.TOWERS:
        assert_same_tensors(tmp_path / "out", tmp_path / "in")
        assert report.ignored == []
    else:
        assert len(report.ignored) == len(model.state_dict()) - len(held)


@pytest.mark.parametrize("module_names", [False, True], ids=["hub", "transformers-5-modules"])
def test_llava_comes_back_bit_equal_in_either_layout_and_transformers_reads_it(module_names, tmp_path):
    model = tiny.save("llava", tmp_path / "in")
    if module_names:  # the module's own names, as a plain state dict has them
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        (tmp_path / "in/model.safetensors").unlink()
        torch.save(tensors, tmp_path / "in/pytorch_model.bin")
        assert "model.language_model.layers.0.mlp.up_proj.weight" in tensors
    info, params, _ = read_params(tmp_path / "in")
    writers.write(tmp_path / "out", params, info.config, layout="llava", base=info)
    assert_same_tensors(tmp_path / "out", tmp_path / "in")
    again, loading = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_stacked_experts_of_a_transformers_model_are_read_and_written_back_stacked(tmp_path):
    model = tiny.save("mixtral", tmp_path / "in")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert tensors["model.layers.1.mlp.experts.gate_up_proj"].shape == (5, 80, 24)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_bytes((tmp_path / "in/config.json").read_bytes())
    torch.save(tensors, stacked / "pytorch_model.bin")
    _, params, _ = read_params(tmp_path / "in")
    info, again, _ = read_params(stacked)
    for path, array in params.items():
        np.testing.assert_array_equal(again[path], array)
    writers.write(tmp_path / "out", again, info.config, layout="lm", base=info)
    assert_same_tensors(tmp_path / "out", stacked)
    # Without the checkpoint that it came from, it is written as transformers writes it.
    writers.write(tmp_path / "plain", again, info.config, layout="lm")
    assert_same_tensors(tmp_path / "plain", tmp_path / "in")


def test_older_hub_layout_of_llava_with_vision_model_in_its_names_is_read(tmp_path):
    model = tiny.save("llava", tmp_path / "in")
    _, params, _ = read_params(tmp_path / "in")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "in/config.json").read_bytes())
    stored = readers.open_checkpoint(tmp_path / "in")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): t.read() for name, t in stored.items()}
    torch.save({name: torch.tensor(np.array(a)) for name, a in renamed.items()}, old / "pytorch_model.bin")
    info, again, _ = read_params(old)
    for path, array in params.items():
        np.testing.assert_array_equal(again[path], array)
    writers.write(tmp_path / "out", again, info.config, layout="llava", base=info)
    assert set(readers.open_checkpoint(tmp_path / "out")) == set(renamed)
    assert len(renamed) == len(model.state_dict())


def test_trained_state_on_devices_is_written_like_its_arrays(tmp_path):
    tiny.save("llama", tmp_path / "in")
    info, params, _ = read_params(tmp_path / "in")
    state = {path: jax.numpy.asarray(array) for path, array in params.items()}
    writers.write(tmp_path / "out", state, info.config, layout="lm", base=info)
    assert_same_tensors(tmp_path / "out", tmp_path / "in")
