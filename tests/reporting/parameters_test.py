"""Activated parameters: the language model's, from the config, whatever else the manifest says."""

import json

from moe_vlm_jax import validation
from moe_vlm_jax.models import size
from moe_vlm_jax.reporting.evaluations import Parameters
from tests.reporting import examples
from tests.reporting.folders_test import one
from tests.training import examples as training_examples


def test_activated_parameters_are_those_of_the_language_model_whatever_the_manifest_counts(tmp_path):
    parameters = one(tmp_path / "a").parameters
    assert (parameters.total, parameters.activated) == (5_296_993_280, 3_618_862_080)
    assert parameters.of == "language model"


def test_adapters_and_quantisation_change_no_count(tmp_path):
    head = examples.manifest()
    head["config"] |= {"model.lora.rank": 8, "model.quant.kind": "nf4"}
    assert one(tmp_path / "a", head=head).parameters.activated == 3_618_862_080


def test_a_manifest_without_a_whole_config_counts_itself_and_one_without_counts_says_so(tmp_path):
    head = examples.manifest()
    del head["config"]["model.moe.top_k"]
    found = one(tmp_path / "a", head=head)
    assert found.parameters == Parameters(11, 7, "whole model, by its manifest")
    assert "of the whole model" in found.remarks[0]
    del head["parameters"]
    found = one(tmp_path / "b", head=head)
    assert found.parameters is None
    assert "activated parameters are not known" in found.remarks[0]


def test_a_run_that_is_still_at_hand_tells_its_model(tmp_path):
    config = training_examples.run_config()
    counts = size.count_parameters(config.model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(validation.flatten(config)))
    head = examples.manifest() | {"config": {"benchmarks": ["gqa"]}, "parameters": counts["model"]._asdict()}
    head["checkpoint"] = {"path": str(tmp_path / "run"), "kind": "workdir", "step": 3, "hash": "abc"}
    found = one(tmp_path / "a", head=head)
    assert found.parameters[:2] == counts["decoder"]
    assert found.remarks == ()
    head["parameters"]["total"] += 1  # something else lies there now
    assert one(tmp_path / "b", head=head).parameters.of == "whole model, by its manifest"
    (tmp_path / "run" / "config.json").unlink()
    assert one(tmp_path / "c", head=head).parameters.of == "whole model, by its manifest"
