"""Greedy answers of the reference, token by token (goldens/models/*/greedy8.npz)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import generate
from moe_vlm_jax.models import vlm
from tests.models import golden_batches, golden_test

pytestmark = pytest.mark.goldens


@pytest.mark.parametrize(
    "model_name", [pytest.param(m, marks=[pytest.mark.slow] * (i > 0)) for i, m in enumerate(golden_test.MODELS)]
)
def test_greedy_tokens_and_scores_equal_the_reference(model_name):
    case = dict(np.load(golden_test.FOLDER / model_name / "greedy8.npz"))
    config, params = golden_test.checkpoint(model_name)
    # The reference's eval capacity drops nothing at top-2 of 4; for the others dropless says the same.
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dropless"))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    batch = golden_batches.splice(case, num_patches=config.vision.num_tokens)
    want = case["new_tokens"]

    out = generate.generate(
        graphdef,
        params,
        batch,
        config=config,
        generation=config_lib.GenerationConfig(max_new_tokens=want.shape[1]),
        end_tokens=[config.decoder.vocab_size],  # no such token: the case runs to its end
    )
    np.testing.assert_array_equal(out.tokens, want)

    @jax.jit
    def scores(params, batch, tokens):
        """Scores of each step with the cache, fed with the reference's tokens."""
        model = nnx.merge(graphdef, params)
        hidden, cache = model.prefill(batch, batch.tokens.shape[1] + tokens.shape[1])
        found = [model.logits(hidden[:, -1])]
        for i in range(tokens.shape[1] - 1):
            hidden, cache = model.decode_step(tokens[:, i : i + 1], cache)
            found.append(model.logits(hidden[:, 0]))
        return jnp.stack(found, axis=1)

    np.testing.assert_allclose(scores(params, batch, jnp.asarray(want)), case["scores"], atol=5e-5, rtol=0)
