"""Greedy tokens equal those of transformers' own generate, on tiny random checkpoints, with and without images."""

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
from tests.models import hf_parity_test

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


# (family, repetition penalty)
FAMILIES = [("phi", 1.0), ("stablelm", 1.0), ("qwen2", 1.4), ("llama", 1.0), ("llama", 0.7)]


@pytest.mark.parametrize(("family", "penalty"), FAMILIES)
def test_greedy_tokens_of_uneven_prompts_equal_those_of_transformers_batch(family, penalty, tmp_path):
    model = tiny.build(family)
    with torch.no_grad():  # the embedding or the head's bias would otherwise say one token again and again
        for name, parameter in model.named_parameters():
            if "layers." not in name:
                parameter.mul_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    model.save_pretrained(tmp_path)
    ours = hf_parity_test.load_model(tmp_path, sections={"decoder"}, vision=hf_parity_test.NO_VISION)
    graphdef, params = nnx.split(ours)
    # transformers' penalty sees padding too, so where there is one, prompts need none.
    lengths = (9, 2, 12, 5) if penalty == 1.0 else (9, 9, 9, 9)
    rows = [np.random.default_rng(i).integers(6, 61, length) for i, length in enumerate(lengths)]
    longest = max(map(len, rows))
    padded = torch.tensor(np.array([[5] * (longest - len(row)) + row.tolist() for row in rows]))
    settings = {} if penalty == 1.0 else {"repetition_penalty": penalty}
    out = model.generate(
        input_ids=padded,
        attention_mask=(padded != 5).long(),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=5,
        **settings,
    )
    expected = out[:, longest:].numpy()
    batch = prompts_lib.prompt_batch(
        [prompts_lib.Prompt(row.astype(np.int32)) for row in rows],
        tokens_per_image=1,
        row_length=16,
        num_images=0,
        image_size=2,
        padding_side="left" if penalty == 1.0 else "right",
    )
    found = generate_lib.generate(
        generate_lib.dropless_graphdef(graphdef, params),
        params,
        batch,
        config=ours.config,
        generation=config_lib.GenerationConfig(max_new_tokens=NEW, repetition_penalty=penalty),
        end_tokens=[-1],
    )
    np.testing.assert_array_equal(found.tokens, expected)
    assert len(np.unique(expected)) > 2
