"""Checkpoints that fit and that do not: all mistakes in one error, all that is left out reported, little memory."""

import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, load, readers, writers
from moe_vlm_jax.models import vlm
from tests.hf import tiny

ALL = {"decoder", "vision", "projector"}


def abstract_state(config, sections=ALL) -> nnx.State:
    state = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    pairs = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, v) for path, v in pairs if path[0] in sections])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for kind in ("phi", "llama", "clip", "clip_whole", "llava"):
        tiny.save(kind, folder / kind)
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(originals, tmp_path / "copies")
    return tmp_path / "copies"


def edit_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    arrays = {name: np.array(t.read()) for name, t in readers.open_checkpoint(path).items()}
    change(arrays)
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def load_decoder(folder, **changes):
    config = configs.read(folder).config
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))
    return load.load_into(abstract_state(config, {"decoder"}), folder, config)


def test_missing_unused_and_mis_shaped_tensors_come_in_one_error(folder):
    def spoil(arrays):
        del arrays["model.layers.1.self_attn.q_proj.weight"]
        del arrays["model.norm.weight"]
        arrays["model.layers.7.surprise"] = np.ones(2, np.float32)
        arrays["model.layers.0.mlp.up_proj.weight"] = np.ones((39, 24), np.float32)
        arrays["model.layers.2.mlp.up_proj.bias"] = np.ones(40, np.int32)

    edit_tensors(folder / "llama", spoil)
    with pytest.raises(ValueError) as error:
        load_decoder(folder / "llama")
    message = str(error.value)
    assert "2 missing tensor(s): model.layers.1.self_attn.q_proj.weight, model.norm.weight" in message
    assert "1 unused tensor(s): model.layers.7.surprise" in message
    assert "model.layers.0.mlp.up_proj.weight: the file has (39, 24), the model needs (40, 24)" in message
    assert "1 not floating point tensor(s): model.layers.2.mlp.up_proj.bias: int32" in message
    assert "complete the checkpoint" in message


def test_config_that_computes_something_else_is_an_error_although_all_shapes_fit(folder):
    with pytest.raises(ValueError) as error:
        load_decoder(folder / "llama", rope_theta=10000.0, norm_eps=1e-5, max_positions=34)
    message = str(error.value)
    assert "config.decoder.rope_theta=10000.0, but the checkpoint has 300.0" in message
    assert "config.decoder.norm_eps=1e-05, but the checkpoint has 0.02" in message
    assert "config.decoder.max_positions=34 exceeds the checkpoint's 33" in message


def test_experts_that_the_checkpoint_lacks_are_an_error(folder):
    config = dataclasses.replace(configs.read(folder / "llama").config, moe=config_lib.MoEConfig(num_experts=(2,)))
    with pytest.raises(ValueError, match=r"experts by layer are \(2, 0, 2\), but the checkpoint has \(0, 0, 0\)"):
        load.load_into(abstract_state(config, {"decoder"}), folder / "llama", config)


def test_corrupted_safetensors_is_one_error(folder):
    path = folder / "llama/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*download or copy it again"):
        load_decoder(folder / "llama")


def test_tied_head_may_be_stored_twice_but_not_differently(folder):
    edit_tensors(folder / "llama", lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"]}))
    assert load_decoder(folder / "llama").report.ignored == ["lm_head.weight"]
    edit_tensors(folder / "llama", lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight \(tie_embeddings=True, but it differs from"):
        load_decoder(folder / "llama")


def test_buffers_that_are_recomputed_are_counted_as_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder / "llama", lambda a: a.update({name: np.ones(5, np.float32)}))
    report = load_decoder(folder / "llama").report
    assert report.ignored == [name]
    assert any(line.startswith("1 ignored") and name in line for line in report.lines())


def test_every_leaf_is_filled_in_the_dtype_and_on_the_sharding_of_the_abstract_state(folder):
    config = dataclasses.replace(configs.read(folder / "llama").config, param_dtype="bfloat16")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract_state(config, {"decoder"})
    )
    loaded = load.load_into(state, folder / "llama", config)
    for path, variable in tree.leaves(loaded.state).items():
        value = variable.get_value()
        assert isinstance(value, jax.Array) and value.dtype == jnp.bfloat16 and value.sharding == sharding, path
    assert loaded.report.casts == {"float32 -> bfloat16": loaded.report.tensors}


def test_parts_join_into_one_model_with_a_random_projector_only_when_asked(folder):
    info = configs.read(folder / "phi", vision=folder / "clip_whole")
    state = abstract_state(info.config)
    with pytest.raises(ValueError, match=r"no projector: .*`random_projector_seed` to start from a random one"):
        load.load_into(state, folder / "phi", info.config, vision=folder / "clip_whole")
    loaded = load.load_into(state, folder / "phi", info.config, vision=folder / "clip_whole", random_projector_seed=5)
    assert loaded.report.random == [f"projector/linears/{i}/{leaf}" for i in (0, 1) for leaf in ("bias", "kernel")]
    assert loaded.report.discarded == ["lm_head.bias"]
    assert any("the bias of Phi's lm_head is discarded" in note for note in loaded.report.notes)
    leaves = tree.leaves(loaded.state)
    assert "decoder/lm_head/bias" not in leaves
    assert float(jnp.abs(leaves["projector/linears/0/kernel"].get_value()).max()) > 0
    table = readers.open_checkpoint(folder / "clip_whole")
    np.testing.assert_array_equal(
        leaves["vision/class_embed"].get_value(), table["vision_model.embeddings.class_embedding"].read()
    )


@pytest.mark.parametrize(
    "name", ["model.mm_projector.image_spatial_proj.{}", "model.mm_projector.{}", "mm_projector.{}"]
)
def test_projector_of_stage_1_is_read_from_its_file(name, folder):
    info = configs.read(folder / "phi", vision=folder / "clip")
    shapes = {"0.weight": (24, 20), "0.bias": (24,), "2.weight": (24, 24), "2.bias": (24,)}
    tensors = {name.format(key): torch.randn(shape) for key, shape in shapes.items()}
    torch.save(tensors, folder / "mm_projector.bin")
    loaded = load.load_into(
        abstract_state(info.config),
        folder / "phi",
        info.config,
        vision=folder / "clip",
        projector=folder / "mm_projector.bin",
    )
    leaves = tree.leaves(loaded.state)
    for i, key in enumerate(("0", "2")):
        kernel = leaves[f"projector/linears/{i}/kernel"].get_value()
        np.testing.assert_array_equal(kernel, tensors[name.format(f"{key}.weight")].numpy().T)


def test_language_model_alone_lacks_a_tower(folder):
    config = configs.read(folder / "llama").config
    with pytest.raises(ValueError, match=r"no vision tower: .* give `vision`, a folder"):
        load.load_into(abstract_state(config, {"decoder", "vision"}), folder / "llama", config)


def test_given_tower_replaces_the_checkpoints_own(folder):
    config = configs.read(folder / "llava").config
    edit_tensors(folder / "clip", lambda a: a["embeddings.class_embedding"].fill(7))
    loaded = load.load_into(abstract_state(config), folder / "llava", config, vision=folder / "clip")
    assert float(tree.leaves(loaded.state)["vision/class_embed"].get_value()[0]) == 7
    assert len(loaded.report.not_taken) == sum(
        n.startswith("vision_tower") for n in readers.open_checkpoint(folder / "llava")
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 11 MB, whose largest tensor has a tenth of it."""
    folder = tmp_path_factory.mktemp("large")
    decoder = config_lib.DecoderConfig(
        vocab_size=1000,
        embed_dim=256,
        mlp_dim=500,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=64,
        norm="rmsnorm",
        parallel_block=False,
        gated_mlp=True,
        activation="silu",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
    config = config_lib.ModelConfig(decoder=decoder, moe=config_lib.MoEConfig(placement="none"))
    specs = load.state_specs(abstract_state(config, {"decoder"}))
    params = {path: np.ones(spec.shape, np.float32) for path, spec in specs.items()}
    writers.write(folder, params, config, layout="lm")
    return folder, specs, config


def test_loading_needs_the_result_and_at_most_one_tensor_more(large):
    folder, specs, config = large
    tensors = readers.open_checkpoint(folder)
    sizes = [int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors.values()]
    load.load_params(folder, specs, config)  # imports and caches out of the way
    tracemalloc.start()
    params, _ = load.load_params(folder, specs, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = sum(array.nbytes for array in params.values())
    assert result == sum(sizes)
    assert peak < result + max(sizes)


def test_cpu_arrays_take_the_loaded_memory_over_without_a_copy(large):
    folder, _, config = large
    arrays = []
    original = load.aligned_empty
    state = abstract_state(config, {"decoder"})

    def remember(shape, dtype):
        arrays.append(original(shape, dtype))
        return arrays[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "aligned_empty", remember)
        loaded = load.load_into(state, folder, config)
    theirs = {variable.get_value().unsafe_buffer_pointer() for variable in tree.leaves(loaded.state).values()}
    assert {array.ctypes.data for array in arrays} == theirs
