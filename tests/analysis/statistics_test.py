"""Figures of planted routing, worked by hand."""

import numpy as np
import pytest
import scipy.spatial.distance

from moe_vlm_jax.analysis import statistics


def test_disjoint_modalities_are_one_bit_apart_and_equal_ones_none():
    assert statistics.jensen_shannon([0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]) == pytest.approx(1.0, abs=1e-12)
    assert statistics.jensen_shannon([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]) == pytest.approx(0.0, abs=1e-12)


def test_the_divergence_is_scipys():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), size=2)
    expected = scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2
    assert statistics.jensen_shannon(p, q) == pytest.approx(expected, rel=1e-9)


def test_one_modality_alone_has_no_divergence():
    assert np.isnan(statistics.jensen_shannon(statistics.shares([0, 0]), [0.5, 0.5]))


@pytest.mark.parametrize(
    ("counts", "even", "cv"),
    [
        ([5, 5, 5, 5], 1.0, 0.0),
        ([0, 7, 0, 0], 0.0, np.sqrt(3)),
        ([1, 1, 0, 0], 0.5, 1.0),
        ([3, 1], 0.8112781244591328, 0.5),  # binary entropy of 1/4
        ([9], 1.0, 0.0),
    ],
)
def test_entropy_and_variation_of_loads(counts, even, cv):
    assert statistics.load_entropy(np.array(counts)) == pytest.approx(even)
    assert statistics.variation(np.array(counts)) == pytest.approx(cv)


@pytest.mark.parametrize(
    ("counts", "tokens", "top", "expected"),
    [
        ([5, 5, 5, 5], 20, 1, 0.0),
        ([20, 0, 0, 0], 20, 1, 1.0),
        ([10, 10, 0, 0], 20, 1, 1 / 3),  # (1/2 - 1/4) / (1 - 1/4)
        ([20, 20, 0, 0], 20, 2, 1.0),  # every token takes expert 0
        ([10, 10, 10, 10], 20, 2, 0.0),
        ([20, 20], 20, 2, 0.0),
    ],
)
def test_dominance_runs_from_even_to_all(counts, tokens, top, expected):
    assert statistics.dominance(np.array(counts), tokens, top=top) == pytest.approx(expected)


def test_first_choices_and_all_choices_are_counted_apart():
    index = np.array([[0, 2], [0, 1], [2, 0]])
    np.testing.assert_array_equal(statistics.expert_counts(index, 4, top=1), [2, 0, 1, 0])
    np.testing.assert_array_equal(statistics.expert_counts(index, 4, top=2), [3, 1, 2, 0])
    where = np.array([True, False, True])
    np.testing.assert_array_equal(statistics.expert_counts(index, 4, top=2, where=where), [2, 0, 2, 0])
    with pytest.raises(ValueError, match=r"top=3 must lie in 1\.\.2"):
        statistics.expert_counts(index, 4, top=3)


def test_more_image_tokens_than_text_do_not_shift_the_modality_share():
    # Half of the text and half of the images go to expert 0; there are 100 times as many image tokens.
    found = statistics.modality_shares(np.array([2, 2, 0, 0]), np.array([200, 0, 200, 0]))
    np.testing.assert_allclose(found, [0.5, 1.0, 0.0, np.nan])


def test_mutual_information_worked_by_hand():
    # p(c, e) = [[3/8, 1/8], [1/8, 3/8]]: both marginals are even, so I = 2 - H(joint) = 1 - h(1/4).
    found = statistics.information(np.array([[3, 1], [1, 3]]))
    assert found.bits == pytest.approx(1 - 0.8112781244591328)
    assert found.of == pytest.approx(1.0)
    assert found.share == pytest.approx(found.bits)
    assert found.chance == pytest.approx(1 / (2 * 8 * np.log(2)))


def test_an_expert_for_each_class_tells_all_and_independent_choices_nothing():
    told = statistics.information(np.diag([4, 4, 4, 4]))
    assert (told.bits, told.share) == (pytest.approx(2.0), pytest.approx(1.0))
    nothing = statistics.information(np.outer([1, 3], [2, 5, 1]))
    assert nothing.bits == pytest.approx(0.0, abs=1e-12)
    assert statistics.information(np.array([[2, 5], [0, 0]])).share is None
    assert statistics.information(np.zeros((2, 3))).share is None


def test_classes_without_a_number_do_not_count():
    index = np.array([[0], [1], [1], [1]])
    found = statistics.class_counts(index, np.array([0, 1, 1, -1]), (2, 3), top=1)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 2, 0]])


def planted(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns index int[3, 50, 2] with the path 2 0 1 (seconds 3 1 0) 20 times, and which tokens are an image's."""
    first = rng.integers(0, 4, (3, 50))
    index = np.stack([first, (first + 1 + rng.integers(0, 3, first.shape)) % 4], axis=-1)
    index[:, :20] = np.array([[2, 3], [0, 1], [1, 0]])[:, None]
    image = np.arange(50) % 4 == 0
    mixed = rng.permutation(50)
    return index[:, mixed], image[mixed]


def test_the_planted_path_is_found_with_its_exact_count():
    index, image = planted(np.random.default_rng(3))
    by_hand = (index[..., 0] == np.array([2, 0, 1])[:, None]).all(0)
    found = statistics.top_paths(index, image, top=1)
    np.testing.assert_array_equal(found.paths[0], [2, 0, 1])
    assert (found.text[0], found.image[0]) == ((by_hand & ~image).sum(), (by_hand & image).sum())
    assert found.text[0] + found.image[0] >= 20
    assert found.tokens == 50
    assert len(found.paths) == 10
    assert (np.diff(found.text + found.image) <= 0).all()


def test_a_path_of_all_choices_does_not_know_their_order():
    index, image = planted(np.random.default_rng(3))
    swapped = index.copy()
    swapped[:, ::2] = swapped[:, ::2, ::-1]
    for choices in (index, swapped):
        found = statistics.top_paths(choices, image, top=2)
        np.testing.assert_array_equal(found.paths[0], [[2, 3], [0, 1], [0, 1]])
        assert found.text[0] + found.image[0] == 20


def test_the_published_view_equals_an_svd_of_the_centred_matrix():
    first = np.random.default_rng(1).integers(0, 4, (6, 90))
    found = statistics.pca_paths(first, 4, components=3)
    u, s, _ = np.linalg.svd(first - first.mean(0), full_matrices=False)
    scores = (u * s)[:, :3].T
    for row, expected in zip(found, scores, strict=True):
        expected = expected * np.sign(expected[np.argmax(np.abs(expected))])
        scaled = np.clip((expected - expected.min()) / np.ptp(expected), 0.01, 0.99)
        np.testing.assert_array_equal(row, (scaled * 4).astype(int))
    assert found.min() == 0
    assert found.max() == 3


def test_the_published_view_has_no_more_components_than_directions():
    first = np.tile(np.array([[0], [1], [3]]), (1, 20))  # one direction only
    np.testing.assert_array_equal(statistics.pca_paths(first, 4), [[0, 1, 3]])
