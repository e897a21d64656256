"""Wiring: what is wrong is found before anything is allocated, and weights come from where the config says."""

import dataclasses
import json
import types

import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import tree
from moe_vlm_jax.data import pipeline
from moe_vlm_jax.training import base, checkpoint, setup, stages
from tests.training import examples


def _values(state: nnx.State) -> dict[str, np.ndarray]:
    return {name: np.asarray(variable[...]) for name, variable in tree.leaves(state).items()}


@pytest.mark.parametrize(("platform", "chosen"), [("tpu", "ragged"), ("cpu", "blocks"), ("gpu", "slots")])
def test_the_grouped_matmul_is_chosen_by_the_platform(platform, chosen):
    config = examples.run_config().model
    assert setup.resolve(config, platform).moe.grouped_matmul == chosen
    fixed = dataclasses.replace(config, moe=dataclasses.replace(config.moe, grouped_matmul="ragged"))
    assert setup.resolve(fixed, platform).moe.grouped_matmul == "ragged"


def test_the_abstract_batch_has_the_shape_and_place_of_a_real_one(tmp_path):
    config = examples.run_config(cache=tmp_path)
    mesh = setup.make_model(config).mesh
    iterator = pipeline.make_train_data(config).iterator()
    real = setup.to_devices(next(iterator).batch, mesh)
    iterator.close()
    abstract = setup.abstract_batch(config, mesh)
    for name, shape in abstract._asdict().items():
        array = getattr(real, name)
        if name == "reference_log_probs":  # not of a supervised run
            assert array is None and shape is None
            continue
        assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding), name
    config.data.images_per_row = 0
    assert setup.abstract_batch(config, mesh).images is None
    config.data.row_lengths, config.data.images_per_row = (5, 9), 40
    longest = setup.abstract_batch(config, mesh)
    assert longest.tokens.shape == (2, 2, 9)
    assert longest.images.shape == (2, 2 * 2, 64, 64, 3)  # nine slots hold two images of four


def test_patterns_must_name_every_parameter_once():
    config = examples.run_config(trainable=("decoder/.*", "projectr/.*"), frozen=("vision/.*", "decoder/embed/.*"))
    with pytest.raises(ValueError) as error:
        setup.make_model(config)
    message = str(error.value)
    assert "'decoder/embed/embedding' is named by training.trainable and training.frozen" in message
    assert "'projector/linears/0/kernel' is named by none of training.trainable, training.frozen" in message
    assert "training.trainable pattern 'projectr/.*' names no parameter" in message


STAGES = ["EVERYTHING", "PRETRAIN", "FINETUNE", "FINETUNE_FROZEN_PROJECTOR", "MOE_ONLY", "FFN_ALL"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_stage_names_every_parameter_of_every_backbone(stage, parallel):
    config = examples.run_config(**getattr(stages, stage)._asdict())
    config.model.decoder.parallel_block = parallel
    if parallel:  # the blocks of Phi have one norm, and no pattern may name nothing
        config.model.moe.use_residual = True
    setup.make_model(config)


def test_initial_weights_depend_on_the_seed_alone_and_frozen_ones_are_narrow(compilation_cache):
    config = examples.run_config(**stages.FINETUNE._asdict())
    config.model.compute_dtype = "bfloat16"
    model = setup.make_model(config)
    trainable, frozen = setup.initial_params(model, config)
    assert {str(value.dtype) for value in _values(frozen).values()} == {"bfloat16"}
    assert {str(value.dtype) for value in _values(trainable).values()} == {"float32"}
    first = checkpoint.fingerprint(frozen)
    assert checkpoint.fingerprint(setup.initial_params(model, config)[1]) == first
    config.training.seed += 1
    assert checkpoint.fingerprint(setup.initial_params(model, config)[1]) != first


def test_a_finished_checkpoint_is_taken_up_only_with_its_own_frozen_weights(tmp_path, compilation_cache):
    config = examples.run_config(cache=compilation_cache, **stages.FINETUNE._asdict())
    run, state = setup.make_run(config, tmp_path)
    run.checkpoints.save(state._replace(step=state.step + 2), {"next_step": 2, "data": run.data.fingerprint})
    run.checkpoints.close()
    run, state = setup.make_run(config, tmp_path)
    assert int(setup.start(run, state).step) == 2
    assert run.iterator.get_state()["next_step"] == 2
    run.checkpoints.close()
    run.iterator.close()
    # The seed is part of the config; pretend that somebody edited config.json.
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training.seed": 6}))
    config.training.seed = 6
    run, state = setup.make_run(config, tmp_path)
    with pytest.raises(ValueError, match=r"random initialisation of seed 5\), but .* of seed 6 now gives"):
        setup.start(run, state)
    run.checkpoints.close()
    run.iterator.close()


def test_a_dense_base_is_upcycled(tmp_path, monkeypatch):
    """The parts of the loader are tested in tests/hf; here a stand-in gives it the weights of a dense model."""
    config = examples.run_config(base=str(tmp_path))
    dense = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, placement="none"))
    parent = examples.random_model(dense, seed=3)[1]
    info = type("Info", (), {"config": dense})
    monkeypatch.setattr(base.hf_configs, "read", lambda folder, vision: info)
    loaded = type("Loaded", (), {"state": parent})
    calls = []
    monkeypatch.setattr(base.hf_load, "load_into", lambda *args, **kwargs: calls.append((args, kwargs)) or loaded)
    config.training.base_projector = "random"
    model = setup.make_model(config)
    trainable, _ = setup.initial_params(model, config)
    (((_, folder, loaded_config), kwargs),) = calls
    assert (folder, loaded_config) == (str(tmp_path), dense)
    assert kwargs == {"vision": None, "projector": None, "random_projector_seed": config.training.seed}
    ours, theirs = _values(trainable), _values(parent)
    for expert in range(4):
        np.testing.assert_array_equal(
            ours["decoder/groups/1/blocks/0/moe/experts/up/kernel"][0, expert],
            theirs["decoder/groups/0/blocks/0/mlp/up/kernel"][1],
        )


@pytest.mark.parametrize(("seen_here", "said_by_process_0"), [(4, 6), (None, 6), (6, None)])
def test_process_0_says_from_which_checkpoint_all_go_on(monkeypatch, seen_here, said_by_process_0):
    """A network file system may show other processes an older newest folder, or none yet."""
    restored = []

    def restore(abstract, step):
        restored.append(step)
        return checkpoint.Restored("the state", {"next_step": step})

    checkpoints = types.SimpleNamespace(latest_step=lambda: seen_here, restore=restore)
    iterator = types.SimpleNamespace(start=lambda: None, set_state=restored.append)
    run = types.SimpleNamespace(checkpoints=checkpoints, iterator=iterator, abstract_state=None)
    monkeypatch.setattr(setup.distributed, "from_leader", lambda value: said_by_process_0)
    state = setup.start(run, "before the first step")
    if said_by_process_0 is None:
        assert (state, restored) == ("before the first step", [])
    else:
        assert (state, restored) == ("the state", [said_by_process_0, {"next_step": said_by_process_0}])
