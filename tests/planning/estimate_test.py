"""The roofline against times worked out by hand."""

import pytest

from moe_vlm_jax import collectives
from moe_vlm_jax.planning import chips, estimate, targets
from moe_vlm_jax.training import metrics

# 100 FLOP/s, 10 bytes of memory/s, 2 bytes/s a link, and a ring closes at 8.
CHIP = chips.Chip(100.0, 10.0, 2.0, 8)
SWITCH = CHIP._replace(closed_ring=0)


def collective(kind: str, n: int, size: float = 64.0, *, asynchronous: bool = False, count: int = 1):
    groups = ((0, 1),) if kind == "collective-permute" else (tuple(range(n)),)
    return collectives.Collective(kind, "", "", groups, n, asynchronous, count, size)


@pytest.mark.parametrize(
    ("kind", "n", "chip", "seconds"),
    [
        ("all-gather", 4, CHIP, 48 / 2),  # a line: what is sent, over one link
        ("all-gather", 8, CHIP, 56 / 4),  # a ring: both directions
        ("reduce-scatter", 4, CHIP, 48 / 2),
        ("all-reduce", 4, CHIP, 96 / 2),
        ("all-to-all", 2, CHIP, 32 / 2),
        ("all-to-all", 4, CHIP, 64 / 2),  # the middle link: 4 x 64 / 4
        ("all-to-all", 16, CHIP, 256 / 4),
        ("all-to-all", 16, SWITCH, 60 / 2),
        ("collective-permute", 2, CHIP, 64 / 2),
        ("all-gather", 1, CHIP, 0.0),
    ],
)
def test_the_time_of_a_collective(kind, n, chip, seconds):
    assert estimate.collective_seconds(collective(kind, n), chip) == seconds


def test_a_step_is_its_longest_part_and_what_it_waits_for():
    made = estimate.estimate(
        flops=500.0,
        memory_bytes=70.0,
        collectives=[
            collective("all-gather", 4, asynchronous=True, count=3),  # 72 s
            collective("all-reduce", 4, count=2),  # 96 s
        ],
        model_flops=400.0,
        chip=CHIP,
    )
    assert (made.compute, made.memory, made.hidden_collectives, made.exposed_collectives) == (5.0, 7.0, 72.0, 96.0)
    assert made.step == 72.0 + 96.0
    assert made.bound == "exposed collectives"
    assert made.mfu == 400.0 / (168.0 * 100.0)


def test_every_target_has_rates_and_they_agree_with_those_that_training_reports():
    assert set(targets.TPUS) | set(targets.gpus.GPUS) == set(chips.CHIPS)
    for family, kind in {
        "v4": "TPU v4",
        "v5e": "TPU v5 lite",
        "v5p": "TPU v5",
        "v6e": "TPU v6 lite",
        "a100": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
    }.items():
        assert chips.CHIPS[family].flops == metrics.PEAK_BF16_FLOPS[kind]


def test_two_cores_share_a_chip_but_not_its_links():
    assert chips.share(CHIP, 2) == chips.Chip(50.0, 5.0, 2.0, 8)
