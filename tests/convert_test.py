"""The command line and the call that convert checkpoints."""

import json

import numpy as np
import pytest
import safetensors.numpy

from moe_vlm_jax import convert
from moe_vlm_jax.hf import configs, readers
from moe_vlm_jax.training import base
from tests import conftest
from tests.hf import tiny

GOLDEN_MODELS = sorted(path.parent for path in (conftest.goldens_folder() / "models").glob("*/checkpoint"))


def arrays(folder) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read()) for name, tensor in readers.open_checkpoint(folder).items()}


@pytest.mark.goldens
@pytest.mark.parametrize("folder", GOLDEN_MODELS, ids=lambda path: path.name)
def test_reference_checkpoint_converts_to_itself(folder, tmp_path, capsys):
    source = folder / "checkpoint"
    name = json.loads((source / "config.json").read_text())["mm_image_tower"]
    tower = conftest.goldens_folder() / "vision_tower" / name
    target = tmp_path / "moe_llava"
    status = convert.main(["--source", str(source), "--vision", str(tower), "--target", str(target), "--check"])
    printed = capsys.readouterr().out
    assert status == 0
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (target / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert (target / "preprocessor_config.json").exists()
    assert "check passed" in printed
    total = next(line for line in printed.splitlines() if line.startswith("total"))
    tensors = readers.open_checkpoint(source)
    assert total.split()[1:3] == [f"{len(tensors):,}", f"{sum(int(np.prod(t.shape)) for t in tensors.values()):,}"]


def test_language_model_and_tower_become_a_dense_stage_1_model_of_the_reference(tmp_path, capsys):
    tiny.save("phi", tmp_path / "phi")
    tiny.save("clip_whole", tmp_path / "openai/tiny-clip")
    (tmp_path / "phi/tokenizer.json").write_text("{}")
    flags = ["--source", str(tmp_path / "phi"), "--vision", str(tmp_path / "openai/tiny-clip")]
    target = tmp_path / "out/llava"
    assert convert.main([*flags, "--target", str(target)]) == 1
    assert "no projector" in capsys.readouterr().err and not target.exists()

    assert convert.main([*flags, "--target", str(target), "--random-projector-seed", "3", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "1 discarded, as the reference does: lm_head.bias" in printed
    assert "4 initialised at random, as asked" in printed
    raw = json.loads((target / "config.json").read_text())
    assert raw["model_type"] == "llava_phi" and raw["architectures"] == ["LlavaPhiForCausalLM"] and "moe" not in raw
    assert raw["mm_image_tower"] == "openai/tiny-clip" and raw["mm_hidden_size"] == 20
    assert raw["bos_token_id"] == 3 and raw["partial_rotary_factor"] * 12 == pytest.approx(8, abs=0.1)
    made, source = arrays(target), arrays(tmp_path / "phi")
    prefix = "model.image_tower.image_tower."
    for name, array in source.items():
        if name != "lm_head.bias":
            np.testing.assert_array_equal(made.pop(name), array)
    tower = {name: a for name, a in arrays(tmp_path / "openai/tiny-clip").items() if name.startswith("vision_model.")}
    for name, array in tower.items():
        if not name.endswith("position_ids"):
            np.testing.assert_array_equal(made.pop(prefix + name), array)
    assert set(made) == {
        f"model.mm_projector.image_spatial_proj.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    assert (target / "tokenizer.json").exists()
    assert configs.read(target).config.vision.num_heads == 2


def test_llava_becomes_a_dense_model_of_the_reference_in_bfloat16(tmp_path):
    tiny.save("llava", tmp_path / "source")
    conversion = convert.convert(tmp_path / "source", tmp_path / "llava", dtype="bfloat16", check=True)
    raw = json.loads((tmp_path / "llava/config.json").read_text())
    assert raw["model_type"] == "llava_llama" and raw["torch_dtype"] == "bfloat16"
    assert raw["mm_vision_select_feature"] == "cls_patch" and raw["mm_vision_select_layer"] == -3
    info, original = configs.read(tmp_path / "llava"), configs.read(tmp_path / "source")
    assert info.config == original.config
    assert {str(dtype) for _, dtype in conversion.written.tensors.values()} == {"bfloat16"}
    assert "check passed" in conversion.remarks[-1]


def test_decoder_and_tower_can_be_taken_out(tmp_path):
    tiny.save("llava", tmp_path / "llava")
    convert.convert(tmp_path / "llava", tmp_path / "lm", to="lm", check=True)
    convert.convert(tmp_path / "llava", tmp_path / "tower", to="vision", check=True)
    whole = arrays(tmp_path / "llava")
    for name, array in arrays(tmp_path / "lm").items():
        np.testing.assert_array_equal(array, whole[f"language_model.{name}"])
    for name, array in arrays(tmp_path / "tower").items():
        np.testing.assert_array_equal(array, whole[name.replace("vision_model.", "vision_tower.")])
    assert configs.read(tmp_path / "lm").family.model_type == "llama"


def test_errors_are_one_message_and_write_nothing(tmp_path, capsys):
    tiny.save("llama", tmp_path / "llama")
    tensors = arrays(tmp_path / "llama")
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "llama/model.safetensors")
    flags = ["--source", str(tmp_path / "llama"), "--target", str(tmp_path / "out"), "--to", "lm"]
    capsys.readouterr()
    assert convert.main(flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: checkpoint") and "1 missing tensor(s): model.norm.weight" in error
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_a_checkpoint_is_not_overwritten(tmp_path):
    tiny.save("llama", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"already holds config.json, model.safetensors; give an empty folder"):
        convert.convert(tmp_path / "llama", tmp_path / "llama", to="lm")


def test_a_checkpoint_becomes_a_quantised_base_that_a_run_starts_from(tmp_path, capsys):
    tiny.save("mistral", tmp_path / "mistral")
    tiny.save("siglip", tmp_path / "siglip")
    source = tmp_path / "llava"
    joined = ["--source", str(tmp_path / "mistral"), "--vision", str(tmp_path / "siglip"), "--target", str(source)]
    assert convert.main([*joined, "--random-projector-seed", "3"]) == 0
    capsys.readouterr()
    target = tmp_path / "quantised"
    flags = [
        "--source",
        str(source),
        "--target",
        str(target),
        "--to",
        "quantised",
        "--block",
        "8",
        "--dtype",
        "float32",
    ]
    assert convert.main(flags) == 0
    assert f"wrote {target}: nf4, the rest float32, " in capsys.readouterr().out
    assert base.is_saved(str(target))
    record = json.loads((target / "base.json").read_text())
    assert record["source"] == str(source)
    assert (record["model"]["quant.kind"], record["model"]["quant.block"]) == ("nf4", 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "lm", "--kind", "nf4"], "--kind has no effect with --to lm; leave it out, or use --to quantised."),
        (["--to", "quantised", "--check"], "--check has no effect with --to quantised; leave it out."),
        (["--to", "quantised"], "config.json does not exist; give the folder of a checkpoint in HF layout."),
    ],
)
def test_options_of_the_other_way_are_refused(flags, message, tmp_path, capsys):
    assert convert.main(["--source", str(tmp_path / "none"), "--target", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
