"""The command line, end to end on the base that ships, and what it refuses."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from moe_vlm_jax import analyze, assets, ready, tree
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.analysis import log as log_lib
from moe_vlm_jax.hf import configs, writers
from moe_vlm_jax.training import loop, setup
from tests.evaluation.benchmarks import official
from tests.training import examples

BASE = ("--checkpoint", assets.tiny_base(), "--tokenizer", "closed", "--template", "plain_qa")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    args = ("--data", "embedded", "--num-samples", "6", "--batch-size", "4", "--target", str(folder))
    assert analyze.main([*BASE, *args, "--name", "base"]) == 0
    return folder


def test_the_log_the_figures_and_the_page_are_written(target):
    log = log_lib.load(target / "routing.npz")
    assert len(log.sample_ids) == 6
    assert log.layers.tolist() == [0]
    found = json.loads((target / "routing.json").read_text())
    assert found["about"] == {"name": "base", "model": assets.tiny_base(), "data": "embedded, split val"}
    (layer,) = found["counting"]["top-1"]["layers"]
    assert sum(layer["load"]) == pytest.approx(1.0)
    assert sum(layer["counts"]["image"]) == (log.modality == 1).sum() == 24
    assert np.array(found["weights"][0]["distances"]).shape == (4, 4)
    assert found["gradient_consistency"] == {}
    assert "load.png" in {path.name for path in target.iterdir()}
    assert (target / "routing.html").is_file()


def test_two_analyses_share_their_axes(target, tmp_path):
    args = ("--data", "embedded", "--num-samples", "4", "--count", "top-k", "--target", str(tmp_path))
    assert analyze.main([*BASE, *args, "--compare", str(target)]) == 0
    text = (tmp_path / "routing.html").read_text()
    assert "base, top-k" in text
    assert "tiny_base, top-k" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--workdir", "runs/x", "--dtype", "float32"), "--dtype has no effect with --workdir"),
        (BASE, "give --data and --target"),
        ((*BASE, "--data", "nothing", "--target", "t"), "names no source"),
        ((*BASE, "--data", "pope", "--target", "t"), "write --data pope:FOLDER"),
        ((*BASE, "--data", "embedded", "--target", "t", "--compare", "nowhere"), "has no routing.json"),
        ((*BASE, "--data", "embedded", "--target", "t", "--num-samples", "-1"), "must be at least 0"),
        ((*BASE, "--data", "embedded", "--target", "t", "--image-folder", "x"), "--image-folder has no effect"),
        ((*BASE, "--data", "embedded:x", "--target", "t"), "reads no files"),
    ],
)
def test_mistakes_are_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert analyze.main(args) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_benchmarks_questions_are_records_with_their_first_answer(tmp_path):
    official.pope(tmp_path)
    args = analyze._parser().parse_args([*BASE, "--data", f"pope:{tmp_path}"])
    config = config_lib.RunConfig(data=config_lib.DataConfig(answer_prompt="shortly"))
    config, found, where = analyze._records(args, config)
    assert where == "POPE"
    assert config.data.answer_prompt == ""  # the benchmark's prompts are complete
    assert len(found) == 6
    assert found[3].turns[0].text.startswith("<image>\nIs there a popular car in the image?")
    assert found[3].turns[1].text == "no"


def dense_parent(folder: pathlib.Path) -> None:
    """Writes a dense checkpoint whose first layer is the base's expert 0, and whose second is the base's."""
    info = configs.read(assets.tiny_base())
    params = ready.from_checkpoint(assets.tiny_base(), tokenizer="closed", template="plain_qa").load()[1]
    values = {path: np.asarray(variable.get_value()) for path, variable in tree.leaves(params).items()}
    config = dataclasses.replace(info.config, moe=config_lib.MoEConfig(placement="none"))
    dense = {path: value for path, value in values.items() if not path.startswith("decoder/groups/")}
    for path, value in values.items():
        if path.startswith("decoder/groups/1/"):
            leaf = path.removeprefix("decoder/groups/1/")
            of_moe = values[f"decoder/groups/0/{leaf.replace('/mlp/', '/moe/experts/')}"]
            first = of_moe[:, 0] if "/mlp/" in leaf else of_moe
            dense[f"decoder/groups/0/{leaf}"] = np.concatenate([first, value])
    writers.write(folder, dense, config, layout="moe_llava")


def test_drift_is_from_the_dense_parent(tmp_path):
    dense_parent(tmp_path / "dense")
    args = ("--data", "embedded", "--num-samples", "2", "--target", str(tmp_path / "out"))
    assert analyze.main([*BASE, *args, "--dense", str(tmp_path / "dense")]) == 0
    (row,) = json.loads((tmp_path / "out" / "routing.json").read_text())["weights"]
    assert row["drift"][0] == 0.0
    # The parent is expert 0, so both figures are of the same difference.
    ratio = np.array(row["drift"][1:]) / row["distances"][0][1:]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert (tmp_path / "out" / "drift.png").is_file()


@pytest.mark.slow
def test_a_runs_own_held_out_questions_and_logged_gradients_are_shown(tmp_path):
    config = examples.run_config(tmp_path / "images", max_steps=1)
    run, state = setup.make_run(config, tmp_path / "run")
    loop.fit(run, setup.start(run, state))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "stgc/consistency/0": 0.5}) + "\n")
    assert analyze.main(["--workdir", str(tmp_path / "run"), "--num-samples", "3"]) == 0
    found = json.loads((tmp_path / "run" / "analysis" / "routing.json").read_text())
    assert found["about"]["data"] == "embedded, split val"
    assert found["samples"] == 3
    assert found["gradient_consistency"] == {"stgc/consistency/0": {"steps": [1], "values": [0.5]}}
    assert (tmp_path / "run" / "analysis" / "gradients.png").is_file()
