"""The routing log: what the model routed, token by token, whatever it was batched with."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.analysis import log as log_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records, sources, tokenize
from moe_vlm_jax.decoding import prompts
from tests.training import examples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = examples.run_config(tmp_path_factory.mktemp("images"))
    moe = dataclasses.replace(config.model.moe, placement="sparse", dispatch="dense", block_rows=128)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    found = list(sources.load_records(config.data, "val")[:5])
    found.append(records.Record("text", (), (records.Turn("human", "which ?"), records.Turn("gpt", "sun"))))
    transform = images_lib.transform_for(config.model.vision, config.data)
    tokenizer = tokenize.load_tokenizer("closed")
    graphdef, params = examples.random_model(config.model, seed=4)

    def collect(batch_size: int, of=found, settings=config) -> log_lib.RoutingLog:
        return log_lib.collect(
            graphdef, params, settings, of, tokenizer, transform, batch_size=batch_size, about={"name": "x"}
        )

    return config, found, collect, (graphdef, params, tokenizer, transform)


@pytest.fixture(scope="module")
def log(made):
    return made[2](3)


def test_the_log_is_what_the_model_routes_for_each_sample_alone(made, log):
    _, found, _, (graphdef, params, tokenizer, transform) = made
    assert log.sample_ids.tolist() == [record.id for record in found]
    for i in (0, 5):
        example = tokenize.encode(found[i], tokenizer, "plain_qa", max_text_tokens=40)
        prompt = prompts.Prompt(example.tokens, tuple(transform(image) for image in example.images))
        of = log.sample == i
        row = prompts.prompt_batch(
            [prompt], tokens_per_image=4, row_length=int(of.sum()), num_images=len(example.images), image_size=64
        )
        routers = nnx.merge(graphdef, params)(jax.tree.map(np.asarray, row), train=False).router
        assert len(routers) == len(log.layers)
        for layer, router in enumerate(routers):
            np.testing.assert_array_equal(log.index[layer, of], router.index)
            np.testing.assert_allclose(log.probs[layer, of], router.probs, atol=1e-3)  # float16
        np.testing.assert_array_equal(log.modality[of], row.image_slot[0] >= 0)
        np.testing.assert_array_equal(log.token[of], np.where(row.image_slot[0] >= 0, -1, row.tokens[0]))
        np.testing.assert_array_equal(log.position[of], row.position[0])


def test_it_does_not_depend_on_the_batch(made, log):
    other = made[2](4)
    np.testing.assert_array_equal(other.index, log.index)
    np.testing.assert_array_equal(other.sample, log.sample)


def test_a_written_log_is_read_as_it_was(log, tmp_path):
    log_lib.save(tmp_path / "routing.npz", log)
    read = log_lib.load(tmp_path / "routing.npz")
    for field in dataclasses.fields(log):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(log, field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["routing.npz"]


def test_another_file_is_no_log(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"something")
    with pytest.raises(ValueError, match="is no routing log"):
        log_lib.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", format=np.array(9))
    with pytest.raises(ValueError, match="has format 9"):
        log_lib.load(tmp_path / "b.npz")


def test_a_model_without_experts_has_nothing_to_log(made):
    config = made[0]
    dense = dataclasses.replace(config.model, moe=config_lib.MoEConfig(placement="none"))
    with pytest.raises(ValueError, match="the model has no MoE layer"):
        made[2](2, settings=dataclasses.replace(config, model=dense))


def test_bad_samples_are_left_out_when_asked_for(made):
    config, found, collect, _ = made
    bad = dataclasses.replace(found[0], id="bad", images=("nowhere.png",))
    with pytest.raises(ValueError, match="bad"):
        collect(2, of=[bad, found[1]])
    dropping = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_sample="drop"))
    assert collect(2, of=[bad, found[1]], settings=dropping).sample_ids.tolist() == [found[1].id]
