"""What a finished run leaves: a checkpoint that is whole or absent, and its line of the table."""

import json

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, load, writers
from moe_vlm_jax.training import export
from tests.training import examples


def _config() -> config_lib.RunConfig:
    config = examples.run_config()
    config.model.decoder.rotary_dim, config.model.decoder.qkv_bias = 8, False  # as HF's Mistral has them
    return config


def test_a_killed_export_leaves_nothing_that_is_taken_for_a_model(tmp_path, monkeypatch):
    config = _config()
    params = examples.random_model(config.model, seed=1)[1]
    folder = tmp_path / "model"
    write = writers.write_safetensors

    def killed(path, tensors, read):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(writers, "write_safetensors", killed)
    with pytest.raises(KeyboardInterrupt):
        export.write_model(folder, params, config)
    assert (tmp_path / "model.partial" / "config.json").is_file()
    assert not folder.exists()

    monkeypatch.setattr(writers, "write_safetensors", write)
    export.write_model(folder, params, config)
    assert not (tmp_path / "model.partial").exists()
    info = configs.read(folder)
    found = tree.leaves(load.load_into(params, folder, info.config).state)
    for name, variable in tree.leaves(params).items():
        np.testing.assert_array_equal(found[name][...], variable[...], err_msg=name)

    before = (folder / "model.safetensors").stat()
    export.write_model(folder, params, config)  # it is there, so it is whole
    assert (folder / "model.safetensors").stat() == before


def test_the_tokenizer_goes_along(tmp_path):
    config = _config()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    config.data.tokenizer = str(tmp_path / "words")
    export.write_model(tmp_path / "model", examples.random_model(config.model, seed=1)[1], config)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_model_that_the_layout_cannot_hold_is_refused_before_the_run():
    config = _config()
    export.check(config)
    config.model.decoder.rotary_dim = 4
    with pytest.raises(ValueError, match="no model family of layout 'moe_llava' can express this decoder"):
        export.check(config)


def test_the_table_holds_means_of_both_ends_and_scores(tmp_path):
    losses = [4.0, 2.0, *[1.5] * 16, 1.0, 0.5]
    lines = [{"step": i + 1, "train/loss": loss} for i, loss in enumerate(losses)]
    lines.insert(3, {"step": 3, "evaluation/exact_match": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    params = examples.random_model(_config().model, seed=1)[1]["projector"]
    assert export.read_summary(tmp_path) is None
    export.write_summary(tmp_path, "stage1", params, 20)
    found = export.read_summary(tmp_path)
    assert found == {
        "run": "stage1",
        "steps": 20,
        "trained_parameters": 12 * 16 + 16,
        "loss": {"start": 3.0, "end": 0.75},
        "scores": {},
    }
    scores = {name: {"exact_match": em, "anls": em + 0.1, "count": 9, "per_type": {}} for name, em in
              (("before", 0.25), ("after", 0.75), ("blind", 0.125))}  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(scores))
    export.write_summary(tmp_path, "stage2", params, 20)
    head, *rows = export.table([found, export.read_summary(tmp_path)]).splitlines()
    assert head.split() == [
        "run",
        "steps",
        "trained",
        "loss",
        "from",
        "to",
        "exact",
        "match",
        "from",
        "to",
        "ANLS",
        "from",
        "to",
        "blind",
    ]
    assert rows[0].split() == ["stage1", "20", "208", "3.000", "0.750", "-", "-", "-", "-", "-"]
    assert rows[1].split() == ["stage2", "20", "208", "3.000", "0.750", "0.250", "0.750", "0.350", "0.850", "0.125"]
