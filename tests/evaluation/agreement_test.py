"""How far two models are apart, worked by hand, and the rules of a merge."""

import math

import numpy as np
import pytest

from moe_vlm_jax.evaluation import agreement


def test_a_difference_is_worked_by_hand():
    first = np.array([[0.0, math.log(3.0)], [2.0, 1.0]], np.float32)  # probabilities 1/4 3/4
    second = np.array([[math.log(3.0), 0.0], [2.0, 1.0]], np.float32)  # 3/4 1/4
    found = agreement.compare(first, second)
    assert found.largest == pytest.approx(math.log(3.0))
    assert found.rms == pytest.approx(math.log(3.0) / math.sqrt(2))
    assert found.argmax == 0.5
    assert found.kl == pytest.approx((0.25 * math.log(1 / 3) + 0.75 * math.log(3)) / 2)
    assert agreement.compare(first, first + 5.0).kl == pytest.approx(0.0, abs=1e-6)


def of(rms: float) -> agreement.Difference:
    return agreement.Difference(rms=rms, largest=3 * rms, argmax=0.9, kl=0.1)


GOOD = agreement.Merge(size=2.0, tune=of(0.5), quantiser=of(0.1), exact=of(1e-4), stored=of(0.12), written=of(0.13))


@pytest.mark.parametrize(
    ("changes", "requantised", "message"),
    [
        ({}, True, None),
        ({"stored": of(0.3), "written": of(0.3)}, False, None),  # a float target has no quantiser
        ({"exact": of(3e-4)}, False, "the merge is wrong"),
        ({"written": of(0.2)}, False, "not what was merged"),
        ({"tune": of(0.11)}, False, "would be lost in the storing"),
        ({"stored": of(0.2), "written": of(0.2)}, True, "more than 1.5 times the 1.00e-01"),
        ({"tune": of(0.0), "stored": of(0.0), "written": of(1e-5)}, False, None),  # an adapter that does nothing yet
    ],
)
def test_rules_of_a_merge(changes, requantised, message):
    refusals = GOOD._replace(**changes).refusals(requantised=requantised)
    assert len(refusals) == (message is not None)
    assert message is None or message in refusals[0]


def test_the_table_leaves_out_what_was_not_measured():
    assert len(GOOD.table().splitlines()) == 6
    lines = GOOD._replace(quantiser=None).table().splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "5.00e-01   1.50e+00       0.9000   1.00e-01" in lines[1]
