"""Parameter counts of the published models, from their configs alone."""

import dataclasses

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import presets, size


@pytest.mark.parametrize(
    ("decoder", "total", "activated"),
    [(presets.phi2, 5.30, 3.62), (presets.stablelm_2_1_6b, 2.89, 2.06), (presets.qwen_1_8b, 3.05, 2.24)],
)
def test_four_experts_top_2_have_the_published_sizes(decoder, total, activated):
    """Billions of the language model; published: Phi-2 5.3 and 3.6, StableLM 2.9 and 2.0, Qwen 3.1 and 2.2."""
    counts = size.count_parameters(presets.vlm(presets.clip_l_336(), decoder()))
    assert (round(counts["decoder"].total / 1e9, 2), round(counts["decoder"].activated / 1e9, 2)) == (total, activated)
    assert counts["model"].total == sum(counts[name].total for name in ("vision", "projector", "decoder"))


def test_without_experts_every_parameter_is_active():
    config = dataclasses.replace(presets.tiny(vocab_size=9), moe=config_lib.MoEConfig(placement="none"))
    assert all(count.total == count.activated for count in size.count_parameters(config).values())
