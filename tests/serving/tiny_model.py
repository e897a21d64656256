"""A model of random weights that says different things to different questions."""

import dataclasses
import functools

import jax
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import ready
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import tokenize
from moe_vlm_jax.training import setup
from tests import generate_test


@functools.cache
def source() -> ready.Source:
    """Returns the model of the closed vocabulary, 40 positions."""
    config = dataclasses.replace(generate_test.run_config(), mesh=config_lib.MeshConfig())
    model = setup.make_model(config)
    params = jax.tree.map(lambda x: x * 1.5, nnx.merge_state(*setup.initial_params(model, config)))
    return ready.Source(
        config=config,
        tokenizer=tokenize.load_tokenizer("closed"),
        transform=images_lib.transform_for(config.model.vision, config.data),
        load=lambda: (model.graphdef, jax.tree.map(jax.numpy.copy, params)),  # whoever loads owns the arrays
    )
