"""Merging on the command line: a run in a workdir to checkpoints, quantised bases and PEFT's folders, or a refusal."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import merge, tree
from moe_vlm_jax.evaluation import agreement
from moe_vlm_jax.hf import adapter_readers, configs, load, readers, writers
from moe_vlm_jax.models import adapters, merging, vlm
from moe_vlm_jax.training import adapted, base, checkpoint, setup, stages
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib
from tests.training import examples

LORA = config_lib.LoraConfig(rank=3, alpha=5.0, targets=adapters.ALL_LINEAR)
NF4 = config_lib.QuantConfig(kind="nf4", block=16)


def run_config(cache: pathlib.Path, stage: stages.Stage, **model) -> config_lib.RunConfig:
    config = examples.run_config(cache, trainable=stage.trainable, frozen=stage.frozen)
    return dataclasses.replace(config, model=dataclasses.replace(base_model(), lora=LORA, **model))


def base_model() -> config_lib.ModelConfig:
    """Returns a model that the reference's layout can express."""
    model = examples.run_config().model
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, rotary_dim=8))


def trained_run(workdir: pathlib.Path, config: config_lib.RunConfig, size: float = 0.3) -> pathlib.Path:
    """Writes the checkpoint of a run whose adapters are random and of this size; routers moved if they train."""
    checkpoint.claim_workdir(workdir, config)
    model = setup.make_model(config)
    trainable, frozen = setup.initial_params(model, config)
    rng = np.random.default_rng(7)
    moved = jax.tree.map(lambda x: jnp.asarray(x + size * rng.normal(size=x.shape), x.dtype), trainable)
    state = state_lib.new_state(moved, optimizer_lib.make_optimizer(config.optimizer, 3).transform, 0)
    saved = checkpoint.Checkpoints(workdir, keep=1, scored=False, base="", fingerprint=checkpoint.fingerprint(frozen))
    saved.save(state._replace(step=jnp.int32(3)), {})
    saved.close()
    return workdir


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory) -> pathlib.Path:
    """A random checkpoint in the reference's layout, with experts."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = base_model()
    _, params = examples.random_model(config, seed=8)
    writers.write(folder, params, config, layout="moe_llava")
    return folder


def with_base(config: config_lib.RunConfig, folder: pathlib.Path) -> config_lib.RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, base=str(folder)))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, cache, hf_base) -> pathlib.Path:
    """A QLoRA run with routers in full."""
    config = with_base(run_config(cache, stages.LORA_AND_ROUTERS, quant=NF4), hf_base)
    return trained_run(tmp_path_factory.mktemp("quantised"), config)


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory, cache, hf_base) -> pathlib.Path:
    """A LoRA run over a float base."""
    return trained_run(tmp_path_factory.mktemp("unquantised"), with_base(run_config(cache, stages.LORA), hf_base))


@pytest.mark.slow
def test_merged_checkpoint_has_the_logits_of_the_run(quantised, tmp_path, capsys):
    target = tmp_path / "merged"
    assert merge.main(["--workdir", str(quantised), "--target", str(target), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    rows = ("fine-tune", "quantiser", "merging", "storing", "in all")
    assert [line.split(":")[0] for line in said.splitlines()[1:6]] == list(rows)
    assert "compared on 32 prompts" in said
    # Independently of the command: the folder, read as a checkpoint, on a batch of random text.
    info = configs.read(target)
    assert info.config.lora.rank == 0
    run = adapted.open_run(str(quantised), None)
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(run.config, rows=2, length=23, seed=6))
    config = dataclasses.replace(info.config, compute_dtype="float32")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    params = load.load_into(abstract, target, config).state
    whole = nnx.merge_state(run.trained, run.frozen)
    expected = agreement.logits(run.model.graphdef, whole, [batch])
    merged = agreement.logits(graphdef, params, [batch])
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_rounding_to_bfloat16_is_within_its_own_error(unquantised, tmp_path, capsys):
    assert merge.main(["--workdir", str(unquantised), "--target", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    dtypes = {str(t.dtype) for name, t in readers.open_checkpoint(tmp_path / "merged").items() if "gate.wg" not in name}
    assert dtypes == {"bfloat16"}


@pytest.mark.slow
def test_quantised_again_it_is_a_base_for_another_run(quantised, tmp_path, capsys):
    target = tmp_path / "merged"
    assert merge.main(["--workdir", str(quantised), "--target", str(target), "--requantize"]) == 0
    assert base.is_saved(str(target))
    run = adapted.open_run(str(quantised), None)
    config = with_base(dataclasses.replace(merge._bare(run)), target)
    params = setup.initial_params(setup.make_model(config), config)[1]
    expected = merging.merged(nnx.merge_state(run.trained, run.frozen), LORA, dtype=None)
    assert checkpoint.fingerprint(params) == checkpoint.fingerprint(expected)


@pytest.mark.slow
def test_fine_tune_that_the_quantiser_would_swallow_is_refused_and_nothing_is_left(cache, hf_base, tmp_path, capsys):
    workdir = tmp_path / "run"
    trained_run(workdir, with_base(run_config(cache, stages.LORA, quant=NF4), hf_base), size=1e-4)
    before = sorted(tmp_path.iterdir())
    assert merge.main(["--workdir", str(workdir), "--target", str(tmp_path / "merged"), "--requantize"]) == 1
    said = capsys.readouterr()
    assert "fine-tune is only" in said.err and "--adapter-only" in said.err
    assert "in all: base + adapter" in said.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_wrong_merge_is_refused_and_nothing_is_left(unquantised, tmp_path, capsys, monkeypatch):
    right = adapters.scale
    monkeypatch.setattr(adapters, "scale", lambda lora: 0.99 * right(lora))
    assert merge.main(["--workdir", str(unquantised), "--target", str(tmp_path / "merged"), "--dtype", "float32"]) == 1
    assert "the merge is wrong" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wrong_file_is_refused_and_nothing_is_left(unquantised, tmp_path, capsys, monkeypatch):
    right = merging.lazily_merged

    def without_one(params, lora):
        found = right(params, lora)
        path = next(path for path, value in found.items() if isinstance(value, merging.MergedKernel))
        kernel, _ = found[path]._parts
        return found | {path: merging.MergedKernel(kernel, None, 1.0)}

    monkeypatch.setattr(merging, "lazily_merged", without_one)
    assert merge.main(["--workdir", str(unquantised), "--target", str(tmp_path / "merged"), "--dtype", "float32"]) == 1
    assert "what was written is not what was merged" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_adapters_and_routers_alone_go_to_pefts_folder(quantised, tmp_path, capsys):
    target = tmp_path / "adapter"
    assert merge.main(["--workdir", str(quantised), "--target", str(target), "--adapter-only"]) == 0
    assert "equal when read again" in capsys.readouterr().out
    recorded = json.loads((target / "adapter_base.json").read_text())
    run = adapted.open_run(str(quantised), None)
    assert recorded["base"]["fingerprint"] == checkpoint.fingerprint(adapters.split(run.base)[0])
    assert recorded["base"]["source"] == run.config.training.base
    assert recorded["quant"]["kind"] == "nf4"
    where = {"layout": "moe_llava", "base": run.info}
    lora = adapter_readers.read_config(target, run.config.model, **where)
    config = dataclasses.replace(run.config.model, lora=lora)
    again = adapter_readers.load_adapter(target, config, base_fingerprint=recorded["base"]["fingerprint"], **where)
    trained = tree.leaves(run.trained)
    assert set(again.leaves) == set(trained) and any("router" in path for path in trained)
    for path, variable in trained.items():
        np.testing.assert_array_equal(again.leaves[path], variable.get_value())
    with pytest.raises(ValueError, match="but this one has other"):
        adapter_readers.load_adapter(target, config, base_fingerprint="other", **where)


@pytest.mark.slow
def test_run_that_started_from_an_adapter_belongs_to_the_same_base(quantised, cache, hf_base, tmp_path, capsys):
    """Its routers came whole with the adapter and are frozen now: they go out with it again."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert merge.main(["--workdir", str(quantised), "--target", str(first), "--adapter-only"]) == 0
    config = with_base(run_config(cache, stages.LORA, quant=NF4), hf_base)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, adapter=str(first)))
    workdir = trained_run(tmp_path / "run", config, size=0.1)
    assert merge.main(["--workdir", str(workdir), "--target", str(second), "--adapter-only"]) == 0
    old, new = (json.loads((folder / "adapter_base.json").read_text())["base"] for folder in (first, second))
    assert new == old
    before, after = (readers.open_checkpoint(folder / "adapter_model.safetensors") for folder in (first, second))
    assert set(before) == set(after)
    for name in before:
        assert np.array_equal(before[name].read(), after[name].read()) == name.endswith("gate.wg.weight"), name


@pytest.mark.slow
def test_what_the_user_has_wrong_is_one_message(quantised, unquantised, cache, tmp_path, capsys):
    full = tmp_path / "full"
    checkpoint.claim_workdir(full, examples.run_config(cache))
    for workdir, target, flags, message in (
        (full, "new", [], "model.lora.rank=0, so no adapters to merge"),
        (quantised, "full", [], "exists already"),
        (tmp_path / "nowhere", "new", [], "is no workdir of a run"),
        (unquantised, "new", ["--requantize"], "--requantize has no effect on a base that is not quantised"),
        (quantised, "new", ["--adapter-only", "--to", "llava"], "layout 'llava' is written only for a model"),
    ):
        assert merge.main(["--workdir", str(workdir), "--target", str(tmp_path / target), *flags]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and message in said.err
        assert not (tmp_path / "new").exists()
