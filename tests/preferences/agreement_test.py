"""Kappa and alpha equal published examples."""

import itertools

import numpy as np
import pytest

from moe_vlm_jax.preferences import agreement


def judged(*rows):
    """Rows of one annotator each, '.' where there is no judgement -> judgements by item."""
    names = [f"n{i}" for i in range(len(rows))]
    items = zip(*(row.split() for row in rows), strict=True)
    return [{name: value for name, value in zip(names, item, strict=True) if value != "."} for item in items]


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": sections A, B and C.
BINARY = ("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")
NOMINAL = ("a a b b d c c c e d d a", "b a b b b c c c e d d d")
MISSING = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


@pytest.mark.parametrize(("rows", "alpha"), [(BINARY, 0.095), (NOMINAL, 0.692), (MISSING, 0.743)])
def test_alpha_equals_krippendorffs_own_examples(rows, alpha):
    assert agreement.krippendorffs_alpha(judged(*rows)) == pytest.approx(alpha, abs=5e-4)


def table(*counts):
    """Counts of two annotators' categories (rows: the first's) -> judged items."""
    return [(str(i), str(j)) for i, row in enumerate(counts) for j, count in enumerate(row) for _ in range(count)]


def test_kappa_equals_published_examples():
    # The two tables of 100 items with 60 % raw agreement in en.wikipedia.org/wiki/Cohen's_kappa, and its 50 grants.
    assert agreement.cohens_kappa(table((20, 5), (10, 15))) == pytest.approx(0.4)
    assert agreement.cohens_kappa(table((45, 15), (25, 15))) == pytest.approx(0.1304, abs=5e-5)
    assert agreement.cohens_kappa(table((25, 35), (5, 35))) == pytest.approx(0.2593, abs=5e-5)


def test_kappa_equals_the_matrix_formula_of_scikit_learn():
    # sklearn.metrics.cohen_kappa_score: 1 - sum(w * C) / sum(w * outer(rows, columns) / n), w = 1 off the diagonal.
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (3, 3))
    off = 1 - np.eye(3)
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    assert agreement.cohens_kappa(table(*counts.tolist())) == pytest.approx(
        1 - (off * counts).sum() / (off * expected).sum()
    )


def test_perfect_and_opposite_judgements():
    assert agreement.cohens_kappa(table((3, 0), (0, 4))) == 1
    assert agreement.cohens_kappa(table((0, 5), (5, 0))) == -1
    assert agreement.krippendorffs_alpha(judged("a b b", "a b b")) == 1


def test_where_only_one_category_was_used_chance_explains_all():
    assert agreement.cohens_kappa([("a", "a")]) is None
    assert agreement.krippendorffs_alpha(judged("a a", "a a")) is None
    assert agreement.krippendorffs_alpha(judged("a .", ". b")) is None
    found = agreement.agreement(judged("a a", "a a"))
    assert found is not None
    assert (found.raw, found.alpha, found.kappa["n0", "n1"]) == (1, None, (2, 1, None))
    assert found.report().count("undefined (only one category was used)") == 2


def test_all_pairs_of_annotators_are_compared_on_their_common_items():
    found = agreement.agreement(judged(*MISSING))
    assert found is not None
    assert found.items == 11  # the last item has one judgement
    assert list(found.kappa) == list(itertools.combinations(["n0", "n1", "n2", "n3"], 2))
    assert found.kappa["n0", "n1"][:2] == (9, pytest.approx(8 / 9))
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    # Of 4-fold judged items 1..9 without the first ('.' of n2), counted by hand: equal pairs of all pairs.
    assert found.raw == pytest.approx((3 + 3 + 6 + 6 + 6 + 0 + 6 + 3 + 6 + 3 + 1) / (3 + 8 * 6 + 3 + 1))
    assert "n0 and n1: 9 items, raw 0.889" in found.report()


def test_without_common_items_there_is_no_agreement():
    assert agreement.agreement(judged("a .", ". b")) is None
    assert agreement.agreement([]) is None
