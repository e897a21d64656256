"""The mark of tests that compile for a GPU which is not there."""

import importlib.util

import jax
import pytest

from moe_vlm_jax.planning import gpus

needs_plug_in = pytest.mark.skipif(
    jax.__version_info__[:2] < gpus.FIRST_JAX or importlib.util.find_spec(gpus.PLUGIN) is None,
    reason="needs jax 0.12 or newer with its CUDA plug-in (extra 'plan-gpu', Python 3.12)",
)
