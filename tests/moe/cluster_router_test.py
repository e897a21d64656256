"""Routing by the question's cluster: in one layer, in generation, over meshes and in a run's folder."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.hf import describe
from moe_vlm_jax.moe import cluster_router, question_clusters
from moe_vlm_jax.training import checkpoint, setup
from tests.decoding import engine_test, generate_test
from tests.moe import dispatch_test, expert_parallel_test
from tests.training import examples

B, T, E, K = dispatch_test.B, dispatch_test.T, dispatch_test.E, 6
CLUSTER = np.random.default_rng(0).integers(0, K, (B, T))


@functools.cache
def clusters(dim: int, num: int = K, seed: int = 0, scale: float = 0.2) -> str:
    """Returns a file of random centroids."""
    path = pathlib.Path(tempfile.mkdtemp()) / "clusters.npz"
    centroids = scale * np.random.default_rng(seed).normal(size=(num, dim))
    question_clusters.write(path, question_clusters.Clusters(centroids), {})
    return str(path)


def make_layer(**moe):
    return dispatch_test.make_layer(router="cluster", clusters=clusters(dispatch_test.D), **moe)


def context():
    return dispatch_test.context()._replace(cluster=jnp.array(CLUSTER))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_tokens_experts_and_weights_are_those_of_its_clusters_row(top_k):
    made = make_layer(top_k=top_k)
    out = made.router(dispatch_test.inputs().reshape(B * T, -1), context())
    table = np.asarray(made.router.kernel[...], np.float64)
    for m, cluster in enumerate(CLUSTER.ravel()):
        probs = np.exp(table[cluster]) / np.exp(table[cluster]).sum()
        best = np.argsort(-probs)[:top_k]
        assert best[0] == cluster % E  # the label of k-means, before training
        weights = probs[best] / probs[best].sum() if top_k > 1 else probs[best]
        np.testing.assert_array_equal(out.index[m], best)
        np.testing.assert_allclose(out.weight[m], weights, rtol=1e-5)


def test_the_hidden_states_of_tokens_do_not_matter():
    made, x = make_layer(), dispatch_test.inputs().reshape(B * T, -1)
    jax.tree.map(np.testing.assert_array_equal, made.router(x, context()), made.router(-x, context()))


def test_a_gradient_reaches_the_rows_of_the_clusters_that_came():
    absent = int(CLUSTER[0, 0])
    chosen = np.where(absent != CLUSTER, CLUSTER, (absent + 1) % K)
    here = dispatch_test.context()._replace(cluster=jnp.array(chosen))
    _, _, gradients = dispatch_test.value_and_gradients(make_layer(), dispatch_test.inputs(), here)
    moved = np.flatnonzero(np.abs(gradients["router/kernel"]).max(1))
    assert moved.tolist() == sorted(set(range(K)) - {absent})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"dim": 5}, r"has centroids of 5 numbers, but model.decoder.embed_dim=8"),
        ({"dim": dispatch_test.D, "num": 3}, r"has 3 clusters for 4 experts"),
    ],
    ids=["dim", "few"],
)
def test_clusters_of_another_model_or_too_few_are_refused(file, message):
    with pytest.raises(ValueError, match=message):
        dispatch_test.make_layer(router="cluster", clusters=clusters(**file))


def with_clusters(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    moe = dataclasses.replace(config.moe, router="cluster", clusters=clusters(config.decoder.embed_dim))
    return dataclasses.replace(config, moe=moe)


def test_questions_of_a_batch_go_to_different_experts_and_all_tokens_of_a_row_to_the_same():
    graphdef, params = generate_test.model(with_clusters(generate_test.CONFIG))
    batch = generate_test.batch_of(generate_test.prompts())
    routed = jax.jit(lambda b: nnx.merge(graphdef, params)(b, train=False).router[0].index)(batch)
    index = routed.reshape(*batch.tokens.shape, -1)
    first = [set(np.asarray(row[valid, 0]).tolist()) for row, valid in zip(index, batch.valid, strict=True)]
    assert all(len(experts) == 1 for experts in first)
    assert len(set.union(*first)) > 1


@pytest.mark.slow
def test_cached_generation_equals_full_forward_passes():
    config = with_clusters(generate_test.CONFIG)
    found = generate_test.run(generate_test.batch_of(generate_test.prompts()), config=config)
    graphdef, params = generate_test.model(config)
    batch = generate_test.batch_of(generate_test.prompts())
    asked = batch.labels.copy()
    lengths, rows = batch.valid.sum(axis=1), np.arange(len(batch.tokens))
    forward = jax.jit(lambda b: nnx.merge(graphdef, params).logits(nnx.merge(graphdef, params)(b, train=False).hidden))
    for step in range(generate_test.NEW):
        at = lengths + step
        token = np.asarray(forward(batch._replace(labels=asked)))[rows, at - 1].argmax(-1)
        np.testing.assert_array_equal(found.tokens[:, step], token)
        for array, value in ((batch.tokens, token), (batch.position, at), (batch.valid, True)):
            array[rows, at] = value
        batch.tree[rows, at], batch.branch[rows, at] = 1, 1
        asked[rows, at - 1] = token  # an answer, as a training row has it


@pytest.mark.slow
def test_an_engine_whose_rows_come_and_go_answers_as_generate_alone():
    config = with_clusters(engine_test.CONFIG)
    graphdef, params = generate_test.model(config)
    model = generate_lib.dropless_graphdef(graphdef, params), params
    settings = {"config": config, "end_tokens": (engine_test.END,)}
    engine = engine_lib.Engine(*model, num_rows=2, cache_length=40, steps_per_call=3, **settings)
    generation = dataclasses.replace(generate_test.GREEDY, max_new_tokens=5)
    chosen = generate_test.prompts()
    requests = [engine_lib.Request(prompt=p, generation=generation, row_id=i) for i, p in enumerate(chosen)]
    said = engine_test.drive(engine, [requests])
    for (tokens, _), prompt in zip(said.values(), chosen, strict=True):
        out = generate_lib.generate(*model, generate_test.batch_of([prompt]), generation=generation, **settings)
        assert tokens == np.asarray(out.tokens)[0, : int(out.length[0])].tolist()
    assert engine.computed_tokens == engine.prompt_tokens  # nothing is kept of a beginning


def test_prompts_whose_beginning_is_in_a_cache_are_refused():
    model = nnx.merge(*generate_test.model(with_clusters(generate_test.CONFIG)))
    batch = generate_test.batch_of(generate_test.prompts()[:1])
    _, cache = jax.eval_shape(lambda: model.prefill(batch, 2 * batch.tokens.shape[1]))
    with pytest.raises(ValueError, match="routes a prompt's beginning by its end; prefill it whole"):
        model.extend(batch, cache)


@pytest.mark.parametrize("layout", ["moe_llava", "lm", "llava"])
def test_a_layout_that_cannot_say_it_is_refused(layout):
    with pytest.raises(ValueError, match=f"router='cluster' has no field in layout '{layout}'"):
        describe.config_json(with_clusters(generate_test.CONFIG), layout, base=None, dtype="float32")


def run_config(**training) -> config_lib.RunConfig:
    config = examples.run_config(**training)
    config.model = with_clusters(config.model)
    config.data.share_prefix = False
    config.training.trainable = (r"decoder/groups/.*/moe/.*",)
    config.training.frozen = (r"(?!decoder/groups/.*/moe/).*",)
    return config


def test_word_embeddings_that_would_train_are_refused():
    config = run_config()
    config.training.trainable, config.training.frozen = (".*",), ()
    with pytest.raises(ValueError, match=r"'decoder/embed/embedding' would train, but model.moe.router='cluster'"):
        setup.make_model(config)


def test_a_run_keeps_its_clusters_and_refuses_others(tmp_path):
    config, held = run_config(), tmp_path / question_clusters.FILE
    checkpoint.claim_workdir(tmp_path, config)
    found = checkpoint.read_config(tmp_path)
    assert found.model.moe.clusters == str(held)
    assert question_clusters.read(held) == question_clusters.read(config.model.moe.clusters)
    checkpoint.check_workdir(tmp_path, found)  # the copy will do
    config.model.moe.clusters = clusters(config.model.decoder.embed_dim, seed=1)
    with pytest.raises(ValueError, match=r"model.moe.clusters='.*' are others than those of the run in"):
        checkpoint.check_workdir(tmp_path, config)


def over_meshes() -> list[dict]:
    """Returns the differences between one device and eight."""
    config = expert_parallel_test.run_config("dropless", False)
    model = dataclasses.replace(config.model)
    moe = dataclasses.replace(model.moe, router="cluster", clusters=clusters(model.decoder.embed_dim, num=9))
    config.model = dataclasses.replace(model, moe=moe)
    config.training.trainable = (r"decoder/groups/.*/moe/.*",)
    config.training.frozen = (r"(?!decoder/groups/.*/moe/).*",)
    return [expert_parallel_test.differences(config, ("data_expert_tensor",))]


@pytest.mark.slow
def test_eight_devices_train_as_one():
    found = expert_parallel_test.on_eight_devices("over_meshes()", "cluster_router_test")
    expert_parallel_test.check("dropless", found[0], ("data_expert_tensor",))


def test_a_cluster_begins_with_nearly_all_of_the_weight_on_its_own_expert():
    assert np.exp(cluster_router.LEAD) / (np.exp(cluster_router.LEAD) + E - 1) > 0.9
