"""Every backbone and tower against transformers, layer by layer, in float32, on tiny random checkpoints.

Tolerance: float32 sums in another order; the largest difference measured was 5e-7 of the largest value (or of 1).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, load
from moe_vlm_jax.models import vlm
from tests.hf import tiny

# A tower and projector of the least size, where a test needs none.
NO_VISION = config_lib.VisionConfig(
    image_size=2, patch_size=2, embed_dim=2, mlp_dim=2, num_layers=1, num_heads=1, select_layer=-1
)


def load_model(folder, *, sections: set[str], **changes) -> vlm.VLM:
    """Returns a float32 model with some sections from a checkpoint and the others zero."""
    config = dataclasses.replace(configs.read(folder).config, compute_dtype="float32", **changes)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    pairs = nnx.to_flat_state(params)
    wanted = nnx.from_flat_state([(path, v) for path, v in pairs if path[0] in sections])
    filled = tree.leaves(load.load_into(wanted, folder, config).state)
    rest = [(path, v.replace(jnp.asarray(np.zeros(v.get_value().shape, np.float32)))) for path, v in pairs]
    return nnx.merge(graphdef, nnx.from_flat_state([(p, filled.get("/".join(map(str, p)), v)) for p, v in rest]))


def text_batch(tokens: np.ndarray) -> batch_lib.Batch:
    """Returns rows of text without padding."""
    ones = np.ones(tokens.shape, np.int32)
    return batch_lib.Batch(
        tokens=tokens.astype(np.int32),
        image_slot=-ones,
        images=None,
        labels=batch_lib.IGNORE_INDEX * ones,
        position=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        tree=ones,
        branch=ones,
        valid=ones.astype(bool),
    )


def layer_outputs(layers) -> list[np.ndarray]:
    """Collects every layer's output during the next forward pass of a torch model."""
    collected = []

    def collect(module, args, output):
        collected.append((output[0] if isinstance(output, tuple) else output).detach().numpy())

    for layer in layers:
        layer.register_forward_hook(collect)
    return collected


def assert_close(ours, theirs) -> None:
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def run(model: vlm.VLM, batch: batch_lib.Batch) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Returns every block's output, the hidden state after the final norm, and the logits."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def forward(params, batch):
        merged = nnx.merge(graphdef, params)
        out = merged(batch, train=False, collect_blocks=True)
        return out.blocks, out.hidden, merged.logits(out.hidden)

    return forward(params, batch)


@pytest.mark.parametrize("kind", tiny.LANGUAGE_MODELS)
def test_language_model_equals_transformers_layer_by_layer(kind, tmp_path):
    theirs = tiny.save(kind, tmp_path)
    ours = load_model(tmp_path, sections={"decoder"}, vision=NO_VISION)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 13))
    blocks = layer_outputs(theirs.model.layers)
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_hidden_states=True)
    our_blocks, our_hidden, our_logits = run(ours, text_batch(tokens))
    assert len(our_blocks) == len(blocks) == 3
    for mine, his in zip(our_blocks, blocks, strict=True):
        assert_close(mine, his)
    assert_close(our_hidden, out.hidden_states[-1])
    assert_close(our_logits, out.logits)


@pytest.mark.parametrize("kind", [*tiny.TOWERS, *tiny.WHOLE_TOWERS])
def test_tower_equals_transformers_layer_by_layer(kind, tmp_path):
    theirs = tiny.save(kind, tmp_path)
    config = dataclasses.replace(configs.read(tmp_path).config.vision, select_layer=-1)
    decoder = config_lib.DecoderConfig(
        vocab_size=3, embed_dim=2, mlp_dim=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, rotary_dim=2
    )
    ours = load_model(tmp_path, sections={"vision"}, vision=config, decoder=decoder)
    images = np.random.default_rng(2).normal(size=(2, 21, 21, 3)).astype(np.float32)
    tower = getattr(theirs, "vision_model", theirs)
    blocks = layer_outputs(tower.encoder.layers)
    with torch.no_grad():
        out = tower(torch.tensor(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
    selected, our_blocks = jax.jit(lambda x: ours.vision.hidden_states(x, dtype=jnp.float32))(images)
    assert len(our_blocks) == len(blocks) == 4
    for mine, his in zip(our_blocks, blocks, strict=True):
        assert_close(mine, his)
    assert_close(selected, out.hidden_states[-1])
    assert_close(ours.vision.post_norm(selected), tower.post_layernorm(out.hidden_states[-1]).detach())


def test_llava_equals_transformers_from_pixels_to_logits(tmp_path):
    theirs = tiny.save("llava", tmp_path)
    ours = load_model(tmp_path, sections={"vision", "projector", "decoder"})
    rng = np.random.default_rng(3)
    images = rng.normal(size=(2, 21, 21, 3)).astype(np.float32)
    tokens = rng.integers(0, 60, (2, 19))
    slots = np.full(tokens.shape, -1, np.int32)
    for row, start in enumerate((0, 6)):  # the image in front, and in the middle
        tokens[row, start : start + 10] = 60
        slots[row, start : start + 10] = np.arange(10) + 10 * row
    blocks = layer_outputs(theirs.model.language_model.layers)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        features = theirs.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        out = theirs(torch.tensor(tokens), pixel_values=pixels)
    batch = text_batch(np.where(slots >= 0, 0, tokens))._replace(image_slot=slots, images=images)
    our_blocks, _, our_logits = run(ours, batch)
    assert_close(ours.encode_images(images), np.stack([f.numpy() for f in features]))
    for mine, his in zip(our_blocks, blocks, strict=True):
        assert_close(mine, his)
    assert_close(our_logits, out.logits)
