"""Which layers hold experts, and how layers are grouped for scanning."""

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import placement


@pytest.mark.parametrize(
    ("name", "num_layers", "want"),
    [
        ("sparse", 24, set(range(0, 24, 2))),
        ("sparse", 32, set(range(0, 32, 2))),
        ("dense", 24, set(range(24))),
        ("first_half", 32, set(range(16))),
        ("second_half", 24, set(range(12, 24))),
        ("none", 32, set()),
    ],
)
def test_placement_puts_experts_where_the_reference_does(name, num_layers, want):
    experts = config_lib.layer_experts(config_lib.MoEConfig(placement=name), num_layers)
    assert {i for i, count in enumerate(experts) if count} == want
    assert set(experts) <= {0, 4}


def test_explicit_layers_override_the_placement_and_may_differ_in_experts():
    moe = config_lib.MoEConfig(placement="dense", layers=(1, 4), num_experts=(2, 8))
    assert config_lib.layer_experts(moe, 5) == (0, 2, 0, 0, 8)


@pytest.mark.parametrize(
    ("experts", "num_groups"),
    [
        ((4, 0) * 16, 1),
        ((4, 0) * 2 + (4,), 2),
        ((0,) * 5 + (4,) * 5, 2),
        ((4,) * 6, 1),
        ((0, 2, 0, 0, 8), 4),
        ((4, 0), 2),
    ],
)
def test_groups_cover_every_layer_once_in_order(experts, num_groups):
    groups = placement.group_layers(experts)
    assert len(groups) == num_groups
    layers = [group.layer(b, r) for group in groups for r in range(group.repeats) for b in range(len(group.experts))]
    assert layers == list(range(len(experts)))
    assert all(
        experts[group.layer(b, r)] == group.experts[b]
        for group in groups
        for r in range(group.repeats)
        for b in range(len(group.experts))
    )
