"""Clusters of questions: planted ones are found, and a run that goes by them is whole in its own folder."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax import assets, ready
from moe_vlm_jax.batch import IGNORE_INDEX
from moe_vlm_jax.data import records, sources, tokenize
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.moe import question_clusters
from moe_vlm_jax.training import clustering, loop, setup
from tests.training import examples

SETTINGS = {"num_clusters": None, "num_questions": 500, "seed": 0}


def planted(num: int = 60) -> tuple[list[records.Example], np.ndarray, np.ndarray]:
    """Returns questions about three things, in words that lie near those of the same thing, and which it is."""
    rng = np.random.default_rng(0)
    thing = np.repeat(np.arange(3), 10)
    words = (np.eye(3)[thing] * 4 + rng.normal(size=(30, 3)) * 0.3).astype(np.float32)
    asked = rng.integers(0, 3, num)
    found = []
    for i, about in enumerate(asked):
        tokens = np.append(rng.choice(np.flatnonzero(thing == about), 4), 0)
        found.append(records.Example(str(i), tokens, np.where(np.arange(5) < 4, IGNORE_INDEX, tokens), ()))
    return found, words, asked


def test_planted_clusters_are_found_whatever_the_seed():
    examples_, words, asked = planted()
    vectors, _ = clustering.embed(examples_, words)
    for seed in (0, 1):
        found = clustering.fit(vectors, 3, seed=seed)
        pairs = {(int(a), int(b)) for a, b in zip(asked, found.labels, strict=True)}
        assert len(pairs) == 3
        assert found.inertia < 0.1 * found.spread
        for cluster in range(3):
            np.testing.assert_allclose(found.centroids[cluster], vectors[found.labels == cluster].mean(0), rtol=1e-4)


def test_an_example_without_a_question_is_left_out():
    examples_, words, _ = planted(5)
    answer = records.Example("a", np.array([3, 4]), np.array([3, 4]), ())
    vectors, asked = clustering.embed([answer, *examples_], words)
    assert len(vectors) == len(asked) == 5


def test_fewer_different_questions_than_clusters_are_refused():
    with pytest.raises(ValueError, match="4 clusters are asked for, but the questions have 2 different embeddings"):
        clustering.fit(np.repeat(np.eye(2, dtype=np.float32), 5, axis=0), 4, seed=0)


def routed_config(cache: pathlib.Path):
    config = examples.run_config(cache, max_steps=2)
    config.training.trainable = (r"decoder/groups/.*/moe/.*",)
    config.training.frozen = (r"(?!decoder/groups/.*/moe/).*",)
    config.data.share_prefix = False
    return config


@pytest.mark.slow
def test_a_run_that_goes_by_clusters_answers_when_their_file_is_gone(tmp_path):
    config, file = routed_config(tmp_path / "images"), tmp_path / "clusters.npz"
    table = clustering.make(config, file, **SETTINGS)
    assert [line.split(":")[0] for line in table.splitlines()[:4]] == [f"cluster {i}" for i in range(4)]
    assert "of the questions' variance lies between clusters" in table.splitlines()[4]
    assert len(question_clusters.read(file)) == 4

    config.model.moe.router, config.model.moe.clusters = "cluster", str(file)
    run, state = setup.make_run(config, tmp_path / "run")
    loop.fit(run, setup.start(run, state))
    run.checkpoints.close()
    run.iterator.close()
    file.unlink()
    source = ready.from_workdir(str(tmp_path / "run"))
    graphdef, params = source.load()
    questions = runner.prepare_questions(
        sources.load_records(source.config.data, "val"), source.config, source.tokenizer, source.transform
    )
    found = runner.ask(graphdef, params, source.config, questions, source.tokenizer, source.transform)
    assert len(found.predictions) == 8


def test_a_base_whose_routers_look_at_hidden_states_is_refused(tmp_path):
    config = routed_config(tmp_path / "images")
    config.training.base = assets.tiny_base()
    config.model = ready.from_checkpoint(config.training.base, tokenizer="closed", template="plain_qa").config.model
    file, dim = tmp_path / "clusters.npz", config.model.decoder.embed_dim
    question_clusters.write(file, question_clusters.Clusters(np.eye(4, dim)), {})
    config.model.moe.router, config.model.moe.clusters = "cluster", str(file)
    with pytest.raises(ValueError, match=r"brings routers over hidden states, but model.moe.router='cluster' has a"):
        setup.initial_params(setup.make_model(config), config)


@pytest.mark.slow
def test_clusters_of_other_word_embeddings_are_refused(tmp_path):
    config, file = routed_config(tmp_path / "images"), tmp_path / "clusters.npz"
    clustering.make(config, file, **SETTINGS)
    made = question_clusters.read(file)
    assert len(made.words) == question_clusters.NUM_WORDS

    def start(clusters: question_clusters.Clusters) -> None:
        question_clusters.write(file, clusters, {})
        config.model.moe.router, config.model.moe.clusters = "cluster", str(file)
        setup.initial_params(setup.make_model(config), config)

    start(made)
    start(question_clusters.Clusters(made.centroids))  # of unknown words: nothing to compare
    start(question_clusters.Clusters(made.centroids, {i: w.astype(jnp.bfloat16) for i, w in made.words.items()}))
    for other in (
        {i: 1.01 * word for i, word in made.words.items()},
        {i + 10_000: word for i, word in made.words.items()},
    ):
        with pytest.raises(ValueError, match=r"clusters='.*' were made of other word embeddings .*cluster_questions"):
            start(question_clusters.Clusters(made.centroids, other))


def test_a_model_without_experts_has_nothing_to_choose(tmp_path):
    config = examples.run_config(tmp_path)
    config.model.moe.placement = "none"
    with pytest.raises(ValueError, match="no experts that clusters could choose"):
        clustering.make(config, tmp_path / "c.npz", **SETTINGS)


def test_the_tightest_of_several_beginnings_is_taken(monkeypatch):
    vectors = np.array([[0.0], [1.0], [10.0], [11.0]], np.float32)
    ways = [([5.5, 0.0], [1, 1, 0, 0]), ([0.5, 10.5], [0, 0, 1, 1]), ([1.0, 11.0], [0, 0, 1, 1])]
    answers = iter(ways * 4)

    def kmeans2(*args, **kwargs):
        centroids, labels = next(answers)
        return np.array(centroids)[:, None], np.array(labels)

    monkeypatch.setattr(clustering.vq, "kmeans2", kmeans2)
    found = clustering.fit(vectors, 2, seed=0)
    assert found.centroids.tolist() == [[0.5], [10.5]]
    assert found.inertia == 0.25 and found.spread == pytest.approx(25.25)


def test_the_table_shows_the_questions_nearest_to_each_centroid():
    tokenizer = tokenize.load_tokenizer("closed")
    texts = ("what is it", "which is larger", "which is smaller", "which is the largest item", "describe the chart")
    asked = [np.array(tokenizer.encode(text)) for text in texts]
    texts = [tokenizer.decode(question) for question in asked]
    vectors = np.array([[5.0, 0], [0, 4], [0, 1], [0, 3], [0, 2]], np.float32)
    found = clustering.Fit(np.array([[0, 0], [5, 0]], np.float32), np.array([1, 0, 0, 0, 0]), 2.0, 8.0)
    assert clustering.table(found, vectors, asked, tokenizer).splitlines() == [
        f"cluster 0: 80.0% of questions, e.g. {texts[2]} | {texts[4]} | {texts[3]}",
        f"cluster 1: 20.0% of questions, e.g. {texts[0]}",
        "75.0% of the questions' variance lies between clusters",
    ]
