"""Classes of tokens, on sequences written out."""

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.analysis import token_classes
from moe_vlm_jax.data import records, tokenize, trees
from moe_vlm_jax.data.infographics import vocabulary

_ = -100


def test_parts_of_the_docstrings_sequence():
    labels = np.array([_, _, _, _, 5, 6, 9, _])
    tokens = np.array([1, 0, 0, 3, 3, 5, 6, 9])
    image = np.array([0, 1, 1, 0, 0, 0, 0, 0], bool)
    found = token_classes.parts(labels, tokens, image, ends=(9,))
    np.testing.assert_array_equal(found, [0, -1, -1, 0, 0, 1, 2, 3])


def test_each_answer_of_a_conversation_has_a_first_token_and_an_end():
    labels = np.array([_, 5, 9, _, 6, 7, 9, _])
    tokens = np.array([1, 3, 5, 9, 4, 6, 7, 9])
    found = token_classes.parts(labels, tokens, np.zeros(8, bool), ends=(9,))
    np.testing.assert_array_equal(found, [0, 0, 1, 3, 0, 1, 2, 3])


def test_an_encoded_record_has_its_answer_where_the_answer_stands():
    tokenizer = vocabulary.closed_tokenizer()
    turns = (records.Turn("human", "<image>\nwhich item is largest ?"), records.Turn("gpt", "sun"))
    record = records.Record(id="a", images=("a.png",), turns=turns)
    example = tokenize.encode(record, tokenizer, "plain_qa", max_text_tokens=99)
    tree = trees.join([trees.expand(example, 4)], 4)
    ends = tokenize.end_tokens(tokenizer, "plain_qa")
    parts = token_classes.parts(tree.labels, tree.tokens, tree.image_slot >= 0, ends)
    assert tokenizer.decode(tree.tokens[parts == 1]) == "sun"
    assert set(tree.tokens[parts == 3]) <= set(ends)
    assert (parts == 3).sum() == 1
    assert (parts == -1).sum() == 4


def test_kinds_of_tokens_by_what_they_look_like():
    tokenizer = vocabulary.closed_tokenizer()
    ids = np.array([tokenizer.convert_tokens_to_ids(word) for word in ("sun", "7", "?")] + [tokenizer.eos_token_id])
    table = token_classes.kinds_of_tokens(tokenizer, ids)
    image = np.array([False, False, False, False])
    np.testing.assert_array_equal(token_classes.kinds(ids, image, table), [0, 1, 2, 3])
    image = np.array([False, True, False, False])
    np.testing.assert_array_equal(token_classes.kinds(ids, image, table), [0, -1, 2, 3])


@pytest.mark.parametrize(
    ("class_token", "skip", "expected"),
    [
        (False, 0, [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 3]),
        (True, 1, [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 3]),
        (False, 1, [0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 3, 3]),  # SigLIP read as CLIP is: the first patch is left out
        (True, 0, [-1, 0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]),  # 'cls_patch': the first token is no patch
    ],
)
def test_regions_are_thirds_of_the_picture(class_token, skip, expected):
    vision = config_lib.VisionConfig(image_size=60, patch_size=10, class_token=class_token, skip_tokens=skip)
    tokens = vision.num_tokens
    np.testing.assert_array_equal(token_classes.regions(np.arange(13), vision), expected)
    np.testing.assert_array_equal(token_classes.regions(np.arange(13) + 2 * tokens, vision), expected)  # third image
    assert token_classes.regions(np.array([-1, tokens - 1]), vision).tolist() == [-1, 8]
