"""Greedy tokens equal those of transformers' own generate, on a tiny random LLaVA with and without images."""

import numpy as np
import pytest
import torch
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.hf import configs, load
from moe_vlm_jax.models import vlm
from tests.hf import tiny

NEW = 7
IMAGE = batch_lib.IMAGE_TOKEN_INDEX
# (tokens, images): text alone, an image in front, one in the middle.
PROMPTS = [([3, 9, 17, 22, 41, 12, 8], 0), ([IMAGE, 9, 40, 2], 1), ([3, 50, IMAGE, 7], 1)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return tiny.save("llava", folder), folder


def transformers_tokens(model, tokens: list[int], pixels: np.ndarray | None, end: int | None) -> list[int]:
    """New tokens of one prompt alone; image marks written as often as transformers wants them."""
    per_image, mark = model.config.image_seq_length, model.config.image_token_id
    ids = torch.tensor([[t for token in tokens for t in ([mark] * per_image if token == IMAGE else [token])]])
    images = {} if pixels is None else {"pixel_values": torch.tensor(pixels.transpose(2, 0, 1)[None])}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **images,
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=end,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_greedy_tokens_of_a_padded_batch_equal_those_of_transformers_one_by_one(reference):
    model, folder = reference
    config = configs.read(folder).config
    config.compute_dtype = "float32"
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    params = load.load_into(abstract, folder, config).state
    rng = np.random.default_rng(7)
    pixels = [rng.normal(size=(21, 21, 3)).astype(np.float32) if images else None for _, images in PROMPTS]
    expected = [transformers_tokens(model, t, p, None) for (t, _), p in zip(PROMPTS, pixels, strict=True)]
    assert len({token for row in expected for token in row}) > 4

    end = expected[1][2]
    stopped = [transformers_tokens(model, t, p, end) for (t, _), p in zip(PROMPTS, pixels, strict=True)]
    batch = prompts_lib.prompt_batch(
        [
            prompts_lib.Prompt(np.array(tokens, np.int32), () if picture is None else (picture,))
            for (tokens, _), picture in zip(PROMPTS, pixels, strict=True)
        ],
        tokens_per_image=config.vision.num_tokens,
        row_length=16,
        num_images=2,
        image_size=21,
        padding_side="left",
    )
    for end_token, rows in ((-1, expected), (end, stopped)):
        out = generate_lib.generate(
            graphdef,
            params,
            batch,
            config=config,
            generation=config_lib.GenerationConfig(max_new_tokens=NEW),
            end_tokens=[end_token],
        )
        for row, tokens in enumerate(rows):
            assert np.asarray(out.tokens[row]).tolist() == tokens + [0] * (NEW - len(tokens))
            assert int(out.length[row]) == len(tokens) - (tokens[-1] == end_token)
