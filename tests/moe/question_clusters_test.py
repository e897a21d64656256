"""The question of every tree in packed rows, prompts and pairs, and its nearest centroid, against plain numpy."""

import numpy as np
import pytest

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax.data import records, trees
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.moe import question_clusters

IMAGE, NOTHING = batch_lib.IMAGE_TOKEN_INDEX, batch_lib.IGNORE_INDEX
PATCHES, VOCAB, DIM, K = 4, 40, 6, 5
RNG = np.random.default_rng(0)
WORDS = RNG.normal(size=(VOCAB, DIM)).astype(np.float32)
CLUSTERS = question_clusters.Clusters(RNG.normal(size=(K, DIM)) * 0.3)

# (tokens, how many at which places are answers, the question)
EXAMPLES = {
    "image": ([1, IMAGE, 5, 6, 7, 30, 2], [5, 6], [5, 6, 7]),
    "text only": ([8, 9, 31, 2], [2, 3], [8, 9]),
    "behind the last of two images": ([1, IMAGE, 5, IMAGE, 10, 11, 32, 2], [6, 7], [10, 11]),
    "first of a conversation": ([1, IMAGE, 12, 30, 2, 13, 14, 31, 2], [3, 4, 7, 8], [12]),
    "an image of a later turn": ([15, 16, 30, 2, IMAGE, 17, 31], [2, 3, 6], [15, 16]),
    "nothing behind the image": ([18, IMAGE, 30, 2], [2, 3], []),
    "closed behind the answer": ([1, IMAGE, 19, 20, 33, 3, 4], [4], [19, 20]),
}


def example(name: str) -> records.Example:
    tokens, answers, _ = EXAMPLES[name]
    labels = np.full(len(tokens), NOTHING)
    labels[answers] = np.array(tokens)[answers]
    images = tuple(f"{name}{i}" for i in range(tokens.count(IMAGE)))
    return records.Example(name, np.array(tokens), labels, images)


def pixels(reference: str) -> np.ndarray:
    return np.full((2, 2, 3), len(reference), np.float32)


def row_of(*members: trees.Tree, length: int) -> batch_lib.Batch:
    return trees.collate(
        [members], row_length=length, images_per_row=7, num_patches=PATCHES, image_size=2, load_image=pixels
    )


def packed() -> batch_lib.Batch:
    made = [trees.join([trees.expand(example(name), PATCHES)], PATCHES) for name in EXAMPLES]
    return row_of(*made, length=90)


def nearest(question: list[int]) -> int:
    mean = WORDS[question].mean(axis=0) if question else np.zeros(DIM)
    return int(np.square(CLUSTERS.centroids - mean).sum(axis=1).argmin())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_question_is_the_text_between_the_last_image_and_the_first_answer(name):
    batch, want = packed(), EXAMPLES[name][2]
    own = batch.tree[0] == 1 + list(EXAMPLES).index(name)
    asked = np.asarray(question_clusters.questions(batch))[0]
    assert batch.tokens[0][own & asked].tolist() == want
    assert question_clusters.question_of(example(name).tokens, example(name).labels).tolist() == want


def test_every_token_has_the_cluster_nearest_to_the_mean_of_its_own_tree():
    batch = packed()
    found = np.asarray(CLUSTERS.of_tokens(WORDS, batch))[0]
    wanted = [nearest(question) for _, _, question in EXAMPLES.values()]
    assert len(set(wanted)) > 2  # else a constant would pass
    for number, cluster in enumerate(wanted, start=1):
        assert set(found[batch.tree[0] == number].tolist()) == {cluster}


@pytest.mark.parametrize("name", ["image", "text only", "behind the last of two images", "closed behind the answer"])
def test_a_prompt_has_the_cluster_that_it_was_trained_with(name):
    tokens, answers, question = EXAMPLES[name]
    head = np.array(tokens[: answers[0]], np.int32)
    images = tuple(np.zeros((2, 2, 3), np.float32) for _ in range(tokens.count(IMAGE)))
    settings = {"tokens_per_image": PATCHES, "row_length": 24, "num_images": 2, "image_size": 2}
    for side in ("left", "right"):
        batch = prompts_lib.prompt_batch([prompts_lib.Prompt(head, images)], padding_side=side, **settings)
        for labels in (None, batch.labels):
            found = np.asarray(CLUSTERS.of_tokens(WORDS, batch._replace(labels=labels)))
            assert set(found[batch.valid].tolist()) == {nearest(question)}


@pytest.mark.parametrize("share_prefix", [True, False])
def test_both_answers_of_a_pair_have_the_cluster_of_their_question(share_prefix):
    first = example("image")
    other = np.where(first.labels == 30, 34, first.tokens)
    second = records.Example("other", other, np.where(first.labels == NOTHING, NOTHING, other), first.images)
    sequences = [trees.expand(member, PATCHES) for member in (first, second)]
    batch = row_of(trees.join(sequences, PATCHES, share_prefix=share_prefix), length=30)
    found = np.asarray(CLUSTERS.of_tokens(WORDS, batch))
    assert set(found[batch.valid].tolist()) == {nearest(EXAMPLES["image"][2])}


def test_clusters_are_read_as_written_and_equal_by_content(tmp_path):
    question_clusters.write(tmp_path / "new" / "clusters.npz", CLUSTERS, {"base": "x"})
    found = question_clusters.read(tmp_path / "new" / "clusters.npz")
    np.testing.assert_array_equal(found.centroids, CLUSTERS.centroids)
    assert found == CLUSTERS and hash(found) == hash(CLUSTERS) and found.words == {}
    words = {3: np.ones(DIM, np.float32), 8: np.zeros(DIM, np.float32)}
    question_clusters.write(tmp_path / "c.npz", question_clusters.Clusters(CLUSTERS.centroids, words), {})
    found = question_clusters.read(tmp_path / "c.npz")
    assert list(found.words) == [3, 8] and found.words[3].tolist() == [1.0] * DIM and found == CLUSTERS
    other = CLUSTERS.centroids.copy()
    other[0, 0] += 1
    assert question_clusters.Clusters(other) != CLUSTERS


@pytest.mark.parametrize("content", [None, b"no archive", b"PK\x03\x04 half an archive"])
def test_a_file_that_holds_no_clusters_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.moe.clusters='.*c.npz' is no file of clusters .*; make one with"):
        question_clusters.read(tmp_path / "c.npz")
