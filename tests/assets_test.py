"""The base that ships: whole, small, of the model that configs/sft.py trains, with its record beside it."""

import json
import pathlib
import runpy

import pytest

from moe_vlm_jax import assets
from moe_vlm_jax.hf import configs
from moe_vlm_jax.training import recipe, setup

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = pathlib.Path(assets.tiny_base())


def test_it_is_small_and_inside_the_package():
    assert FOLDER.is_relative_to(ROOT / "moe_vlm_jax")
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
    assert {path.name for path in FOLDER.iterdir()} == {"config.json", "model.safetensors", "metrics.json"}
    packaged = (ROOT / "pyproject.toml").read_text()
    assert '"moe_vlm_jax.assets" = ["tiny_base/*"]' in packaged


@pytest.mark.parametrize("argument", ["tiny", "tiny-full"])
def test_fine_tuning_starts_from_it_wherever_it_is_called(argument, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = runpy.run_path(str(ROOT / "configs" / "sft.py"))["get_config"](argument)
    assert config.training.base == str(FOLDER)
    info = configs.read(FOLDER)
    assert not configs.differences(config.model, info, {"decoder", "vision", "projector"})
    setup.initial_params(setup.make_model(config), config)


def test_its_record_is_that_of_the_chain_as_it_is_now():
    record = json.loads((FOLDER / "metrics.json").read_text())
    assert record["command"] == "python -m moe_vlm_jax.train --config configs/moe_tuning.py"
    assert "synthetic" in record["data"]
    runs = {run["run"]: run for run in record["runs"]}
    now = {
        "pretrain": recipe.tiny_pretraining(),
        "stage1": recipe.stage1("tiny", base=""),
        "stage2": recipe.stage2("tiny", base=""),
        "stage3": recipe.stage3("tiny", base=""),
    }
    assert {name: (run["steps"], record["seeds"][name]) for name, run in runs.items()} == {
        name: (config.training.max_steps, config.training.seed) for name, config in now.items()
    }
    for run in runs.values():
        assert run["loss"]["end"] < run["loss"]["start"], run["run"]
    last = runs["stage3"]["scores"]
    assert last["after"]["exact_match"] > last["before"]["exact_match"] > 3 * last["blind"]["exact_match"]
