"""Prefix trees: the worked example of batch.py, the rules of sharing, and the arrays of a batch."""

import pathlib

import numpy as np
import pytest

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import bad_samples, trees
from moe_vlm_jax.data.records import Example
from tests import conftest

NO = IGNORE_INDEX
PATCHES, SIZE = 2, 3
LETTERS = {"s": 11, "q": 12, "a": 13, "b": 14, "c": 15, "/": 16}


def example(name: str, text: str, trained: str, images: tuple[str, ...] = ()) -> Example:
    """Returns an example of one-letter tokens; '#' is an image, and letters of `trained` are learned."""
    tokens = np.array([IMAGE_TOKEN_INDEX if letter == "#" else LETTERS[letter] for letter in text], np.int32)
    labels = np.array([LETTERS[x] if x in trained else NO for x in text], np.int32)
    return Example(name, tokens, labels, images)


def tree_of(*examples: Example) -> trees.Tree:
    return trees.join([trees.expand(e, PATCHES) for e in examples], PATCHES)


def pixels(reference: str) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), ord(reference), np.float32)


def collate(rows, **changes):
    settings = {
        "row_length": 14,
        "images_per_row": 2,
        "num_patches": PATCHES,
        "image_size": SIZE,
        "load_image": pixels,
    }
    return trees.collate(rows, **settings | changes)


def test_the_worked_example_of_the_batch_module():
    tree = tree_of(example("A", "s#qqa/", "a/", ("x",)), example("B", "s#qb/", "b/", ("x",)))
    batch = collate([[tree, tree_of(example("C", "sqc", "c"))]])
    s, q, a, b, c, end = (LETTERS[x] for x in "sqabc/")
    expected = {
        "tokens": [s, 0, 0, q, q, a, end, q, b, end, s, q, c, 0],
        "tree": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0],
        "branch": [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 0],
        "position": [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 0, 1, 2, 0],
        "labels": [NO, NO, NO, NO, a, end, NO, b, end, NO, NO, c, NO, NO],
        "image_slot": [-1, 0, 1] + [-1] * 11,
        "valid": [True] * 13 + [False],
    }
    for field, values in expected.items():
        assert getattr(batch, field)[0].tolist() == values, field
    assert batch.images.shape == (2, SIZE, SIZE, 3)
    assert (batch.images[0] == ord("x")).all() and (batch.images[1] == 0).all()


@pytest.mark.parametrize(
    ("first", "second", "prefix"),
    [
        (("s#qa", ("x",)), ("s#sa", ("x",)), 3),  # texts part behind the image
        (("sq#qa", ("x",)), ("ss#qa", ("x",)), 1),  # texts part before it
        (("s#qa", ("x",)), ("s#qa", ("y",)), 1),  # another image in the same place
        (("s##qa", ("x", "y")), ("s##qa", ("x", "x")), 3),  # the second image differs
        (("s##qa", ("x", "x")), ("s##ca", ("x", "x")), 5),  # one image twice
        (("s#qa", ("x",)), ("s#qa", ("x",)), 3),  # equal: the slot that predicts 'a' stays in the branch
        (("sqa", ()), ("qsa", ()), 0),  # nothing in common
    ],
)
def test_the_prefix_ends_where_tokens_or_images_differ_or_a_label_begins(first, second, prefix):
    one, two = (example(name, text, "a", images) for name, (text, images) in zip("AB", (first, second), strict=True))
    tree = tree_of(one, two)
    assert (tree.branch == 0).sum() == prefix
    assert (tree.labels[tree.branch == 0] == NO).all()
    assert len(tree) == sum(len(trees.expand(e, PATCHES).tokens) for e in (one, two)) - prefix


def test_every_branch_behind_its_prefix_is_the_sequence_again():
    examples = [example(n, f"sq#{t}a/", "a/", ("x",)) for n, t in zip("ABC", ("q", "cc", "qb"), strict=True)]
    tree = tree_of(*examples)
    for branch, one in enumerate(examples, start=1):
        sequence = trees.expand(one, PATCHES)
        path = (tree.branch == 0) | (tree.branch == branch)
        np.testing.assert_array_equal(tree.tokens[path], sequence.tokens)
        np.testing.assert_array_equal(tree.image_slot[path], sequence.image_slot)
        np.testing.assert_array_equal(tree.labels[path], sequence.labels)
        np.testing.assert_array_equal(tree.position[path], np.arange(len(sequence.tokens)))


def test_a_sequence_that_is_the_start_of_another_keeps_a_slot_of_its_own():
    short, long = example("A", "sq", ""), example("B", "sqac", "c")
    tree = tree_of(short, long)
    assert [(tree.branch == b).sum() for b in (0, 1, 2)] == [1, 1, 3]


def test_one_sequence_alone_is_branch_one_without_a_prefix():
    assert tree_of(example("A", "s#qa", "a", ("x",))).branch.tolist() == [1] * 5


def test_as_many_marks_as_images_is_a_rule():
    for text, images in (("s##qa", ("x",)), ("sqa", ("x",)), ("s#qa", ("x", "y"))):
        with pytest.raises(ValueError, match=r"sample 'A': . <image> marks and . images; write one"):
            trees.expand(example("A", text, "a", images), PATCHES)


def test_image_j_of_row_r_is_image_r_times_the_room_plus_j():
    two = tree_of(example("A", "s##qa", "a", ("x", "y")))
    one = tree_of(example("B", "#qa", "a", ("z",)))
    text = tree_of(example("C", "sqa", "a"))
    batch = collate([[text], [one, one], [two]])
    assert [image[0, 0, 0] for image in batch.images] == [0, 0, ord("z"), ord("z"), ord("x"), ord("y")]
    assert batch.image_slot[1, :8].tolist() == [4, 5, -1, -1, 6, 7, -1, -1]
    assert batch.image_slot[2, :6].tolist() == [-1, 8, 9, 10, 11, -1]
    later = collate([[one, one], [two]], row_numbers=(1, 2))
    np.testing.assert_array_equal(later.image_slot, batch.image_slot[1:])


def test_an_image_that_appears_twice_in_a_sample_is_read_once():
    read = []
    tree = tree_of(example("A", "#q#a", "a", ("x", "x")))
    batch = collate([[tree]], load_image=lambda r: read.append(r) or pixels(r))
    assert read == ["x"] and batch.image_slot[0, :6].tolist() == [0, 1, -1, 0, 1, -1]


def test_rows_without_room_for_images_give_a_batch_without_images():
    assert collate([[tree_of(example("A", "sqa", "a"))], []], images_per_row=0).images is None


def test_a_row_that_does_not_fit_is_an_error():
    tree = tree_of(example("A", "s#qa", "a", ("x",)))
    with pytest.raises(ValueError, match=r"row 0 needs 10 slots and 2 images, the limits are 9 and 2; raise"):
        collate([[tree, tree]], row_length=9)
    with pytest.raises(ValueError, match=r"row 1 needs 10 slots and 2 images, the limits are 10 and 1; raise"):
        collate([[], [tree, tree]], row_length=10, images_per_row=1)


def test_an_image_that_cannot_be_read_names_its_samples():
    def fail(reference):
        raise bad_samples.SampleError("?", "no_image", f"{reference!r} is not an image; replace the file.")

    tree = tree_of(example("A", "s#qa", "a", ("x",)), example("B", "s#ca", "a", ("x",)))
    with pytest.raises(ValueError, match="sample A, B: 'x' is not an image"):
        collate([[tree]], load_image=fail)


def spliced_cases() -> list[pathlib.Path]:
    """Returns the golden cases that hold spliced arrays: all but greedy decoding and the training steps."""
    cases = sorted((conftest.goldens_folder() / "models").glob("*/*.npz"))
    return [path for path in cases if "spliced_labels" in np.load(path).files]


@pytest.mark.goldens
@pytest.mark.parametrize("path", spliced_cases(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_image_slots_and_labels_stand_where_the_reference_splices_them(path):
    case = np.load(path)
    num_patches = case["image_tower_features"].shape[1]
    features = case["projected_image_features"]
    used = 0
    for row, mask in enumerate(case["attention_mask"]):
        tokens, labels = case["input_ids"][row][mask], case["labels"][row][mask]
        marks = int((tokens == IMAGE_TOKEN_INDEX).sum())
        found = trees.expand(Example("a", tokens, labels, tuple(range(marks))), num_patches)
        real = case["spliced_attention_mask"][row].astype(bool)
        expected = case["spliced_labels"][row][real]
        np.testing.assert_array_equal(found.labels, [*expected[1:], NO])
        if "hidden_states.0" in case:
            own = features[used : used + marks].reshape(-1, features.shape[-1])
            embedded = case["hidden_states.0"][row][real]
            image = found.image_slot >= 0
            np.testing.assert_array_equal(embedded[image], own[found.image_slot[image]])
        used += max(1, marks)  # in the reference a row without an image uses up one, too
