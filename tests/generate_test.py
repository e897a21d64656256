"""The question on the command line, for a run's checkpoint and for one in HF layout."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from moe_vlm_jax import arguments, generate, ready
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.data import tokenize
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.training import checkpoint, setup
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib

QUESTION = "how many items are shown ?"


def run_config() -> config_lib.RunConfig:
    vision = config_lib.VisionConfig(
        image_size=16, patch_size=8, embed_dim=12, mlp_dim=20, num_layers=2, num_heads=2, position_init_std=0.5
    )
    decoder = config_lib.DecoderConfig(
        vocab_size=len(tokenize.load_tokenizer("closed")),
        embed_dim=24,
        mlp_dim=36,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=12,
        rotary_dim=12,
        max_positions=40,
        embed_init_std=0.7,
    )
    model = config_lib.ModelConfig(
        vision=vision,
        decoder=decoder,
        moe=config_lib.MoEConfig(num_experts=(2,), block_rows=8),
        compute_dtype="float32",
        remat="none",
    )
    generation = config_lib.GenerationConfig(max_new_tokens=4)
    mesh = config_lib.MeshConfig(fsdp=64)  # of the machine that trained, not of this one
    return config_lib.RunConfig(model=model, generation=generation, mesh=mesh)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "chart.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint whose weights are not those of the seed, and its model."""
    workdir = tmp_path_factory.mktemp("run")
    config = run_config()
    checkpoint.claim_workdir(workdir, config)
    here = dataclasses.replace(config, mesh=config_lib.MeshConfig())
    model = setup.make_model(here)
    trainable, frozen = setup.initial_params(model, here)
    trainable = jax.tree.map(lambda x: x * 1.5, trainable)
    state = state_lib.new_state(trainable, optimizer_lib.make_optimizer(config.optimizer, 3).transform, 0)
    saved = checkpoint.Checkpoints(workdir, keep=1, scored=False, base="", fingerprint=checkpoint.fingerprint(frozen))
    saved.save(state._replace(step=jax.numpy.int32(3)), {})
    saved.close()
    return workdir, here, model.graphdef, nnx.merge_state(trainable, frozen)


@pytest.mark.slow
def test_a_run_answers_with_its_newest_checkpoint(trained, picture, capsys):
    workdir, config, graphdef, params = trained
    asked = ["--workdir", str(workdir), "--image", picture, "--question", QUESTION]
    assert generate.main(asked) == 0
    said = capsys.readouterr()
    record = records_lib.Record(
        id="q", images=(picture,), turns=(records_lib.Turn("human", f"<image>\n{QUESTION}"),), answers=("4",)
    )
    tokenizer = tokenize.load_tokenizer("closed")
    transform = images_lib.transform_for(config.model.vision, config.data)
    questions = runner.prepare_questions([record], config, tokenizer, transform)
    expected = runner.ask(graphdef, params, config, questions, tokenizer, transform).predictions[0]
    assert said.out == expected["prediction"] + "\n"
    assert said.out.strip()
    assert ("cut off after 4 tokens" in said.err) == expected["truncated"]


@pytest.fixture
def loaded(trained, monkeypatch) -> None:
    """Answers from the model in memory: restoring it is tested once, above."""
    _, config, graphdef, params = trained
    source = ready.Source(
        config=config,
        tokenizer=tokenize.load_tokenizer("closed"),
        transform=images_lib.transform_for(config.model.vision, config.data),
        load=lambda: (graphdef, jax.tree.map(jax.numpy.copy, params)),  # whoever loads owns the arrays
    )
    monkeypatch.setattr(ready, "from_workdir", lambda workdir: source)


@pytest.mark.usefixtures("loaded")
def test_settings_of_the_command_line_go_before_those_of_the_run(picture, capsys):
    asked = ["--workdir", "runs/sft", "--image", picture, "--question", QUESTION, "--max-new-tokens", "9"]
    answers = []
    for sampling in ([], ["--temperature", "2"], ["--temperature", "2", "--seed", "5"], ["--temperature", "2"]):
        assert generate.main([*asked, *sampling]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[1] == answers[3]
    assert len(set(answers)) == 3
    assert max(len(answer.split()) for answer in answers) > 4


@pytest.mark.usefixtures("loaded")
def test_streamed_and_stopped_answers_are_those_of_the_whole_answer(picture, capsys):
    asked = ["--workdir", "runs/sft", "--image", picture, "--question", QUESTION, "--max-new-tokens", "9"]
    asked += ["--temperature", "3", "--top-k", "40", "--repetition-penalty", "1.5", "--seed", "2"]
    assert generate.main(asked) == 0
    whole = capsys.readouterr()
    assert generate.main([*asked, "--stream"]) == 0
    assert capsys.readouterr() == whole
    words = whole.out.split()
    assert len(words) > 4
    assert generate.main([*asked, "--stop", words[3], "--stop", words[4]]) == 0
    stopped = capsys.readouterr()
    assert stopped.out.split() == words[: words.index(words[3])]
    assert "cut off" not in stopped.err


@pytest.fixture
def questions(tmp_path, picture) -> pathlib.Path:
    """A file of 13 questions about two pictures and none, and what cannot be asked."""
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "other.png")
    texts = [QUESTION, "which item is largest ?", "which item is smallest ?"]
    rows = [
        {"id": i, "question": texts[i % 3], "images": [[picture], ["other.png"], [picture, "other.png"], []][i % 4]}
        for i in range(13)
    ]
    lines = [json.dumps(row) for row in rows]
    lines.insert(2, '{"id": ')
    lines.insert(5, json.dumps({"id": "zebra", "image": picture, "question": "how many zebras ?"}))
    lines.insert(9, json.dumps({"id": "gone", "image": "gone.png", "question": QUESTION}))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(path: pathlib.Path) -> dict:
    return {row["id"]: (row["answer"], row["finish"]) for row in rows_of(path)}


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_a_file_of_questions_gets_the_answers_that_each_question_gets_alone(questions, tmp_path, capsys, picture):
    out = tmp_path / "answers.jsonl"
    asked = ["--workdir", "runs/sft", "--questions", str(questions), "--out", str(out), "--num-rows", "3"]
    assert generate.main(asked) == 1  # three rows could not be asked
    said = capsys.readouterr()
    assert not said.out
    for fault in (
        "questions.jsonl:3: ",
        "questions.jsonl:6: the tokenizer does not know 'zebras'",
        "questions.jsonl:10: ",
    ):
        assert f"not asked: {fault}" in said.err
    assert "has 13 answers, 13 of them new; 3 rows were not asked" in said.err
    rows = rows_of(out)
    assert sorted(row["id"] for row in rows) == list(range(13))
    shown = [tuple(row["images"]) for row in rows]
    assert len([i for i in range(1, 13) if shown[i] != shown[i - 1]]) <= 6  # those about one picture, mostly together
    for row in rows[:4]:
        images = [part for image in row["images"] for part in ("--image", str(tmp_path / image))]
        assert generate.main(["--workdir", "runs/sft", *images, "--question", row["question"]]) == 0
        assert capsys.readouterr().out == row["answer"] + "\n"
    # Nothing is asked twice, and a draw depends on seed and line alone, however it came to it.
    assert generate.main(asked) == 1
    assert "13 answers, 0 of them new" in capsys.readouterr().err
    sampled = [*asked[:5], str(tmp_path / "whole.jsonl"), "--temperature", "2", "--seed", "3"]
    assert generate.main(sampled) == 1
    whole = answers_of(tmp_path / "whole.jsonl")
    half = tmp_path / "half.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    half.write_text("".join(lines[1::2]) + lines[0][:30])  # a writer that was killed
    assert generate.main([*sampled[:5], str(half), *sampled[6:], "--num-rows", "2"]) == 1
    assert answers_of(half) == whole and len(rows_of(half)) == 13
    capsys.readouterr()
    assert generate.main([*sampled[:5], str(half), "--temperature", "2", "--seed", "4"]) == 1
    assert "give the same settings to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "/nowhere.jsonl", "--out", "o"], "does not exist"),
        (["--questions", "q"], "needs --out"),
        (["--questions", "q", "--out", "o", "--stream"], "--stream have no effect"),
        (["--questions", "q", "--out", "o", "--image", "i"], "--image and"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_a_mistake_about_files_is_one_line(capsys, arguments, message):
    assert generate.main(["--workdir", "runs/sft", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "/nowhere/x.png"], r"x\.png' does not exist"),
        (["--question", "how many zebras ?"], "does not know 'zebras'"),
        (["--question", " "], "question is empty"),
        (["--top-p", "0.5"], "no effect at temperature=0"),
        (["--top-k", "3"], "no effect at temperature=0"),
        (["--repetition-penalty", "0"], r"repetition_penalty=0\.0"),
        (["--stop", ""], "empty"),
        (["--out", "x"], "--out has no effect with --question"),
        (["--num-rows", "0"], "--num-rows 0"),
        (["--temperature", "-1"], r"temperature=-1\.0"),
        (["--max-new-tokens", "40"], "max_positions=40"),
        (["--template", "phi"], "--template has no effect with --workdir"),
        (["--workdir", "/nowhere"], "is no workdir of a run"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(trained, picture, capsys, arguments, message):
    defaults = {"--workdir": str(trained[0]), "--image": picture, "--question": QUESTION}
    kept = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    assert generate.main([*kept, *arguments]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert re.search(message, said.err)
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


def test_a_run_without_a_finished_checkpoint_says_so_and_its_running_save_is_left_alone(tmp_path, capsys):
    config = run_config()
    config.training = config_lib.TrainingConfig(trainable=(".*",), frozen=())
    checkpoint.claim_workdir(tmp_path, config)
    asked = ["--workdir", str(tmp_path), "--question", QUESTION]
    assert generate.main(asked) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    assert generate.main(asked) == 1
    assert "no finished checkpoint" in capsys.readouterr().err
    assert half.is_dir()


@pytest.mark.slow
def test_other_frozen_parameters_than_those_of_the_training_are_refused(trained, picture, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "fingerprint", lambda frozen: "other")
    assert generate.main(["--workdir", str(trained[0]), "--image", picture, "--question", QUESTION]) == 1
    assert "beside other frozen parameters" in capsys.readouterr().err


def of_checkpoint(goldens: pathlib.Path, folder: pathlib.Path) -> list[str]:
    tower = next((goldens / "vision_tower").glob("*/*/config.json")).parent
    tokenizer = goldens / "preprocess" / "tokenizer_gpt2"
    return ["--checkpoint", str(folder), "--vision", str(tower), "--tokenizer", str(tokenizer)]


@pytest.mark.goldens
def test_the_template_of_every_golden_checkpoint_follows_from_its_family(goldens, capsys):
    folders = sorted(path.parent for path in (goldens / "models").glob("*/checkpoint/config.json"))
    assert folders
    for folder in folders:
        args = generate._parser().parse_args([*of_checkpoint(goldens, folder), "--question", "?"])
        source = arguments.source_of(args)
        assert source.config.data.template == folder.parent.name.partition("_")[0].replace("phi2", "phi")
        assert source.transform.size == source.config.model.vision.image_size


@pytest.mark.slow
@pytest.mark.goldens
def test_a_checkpoint_of_the_reference_answers(goldens, capsys):
    folder = min((goldens / "models").glob("*/checkpoint/config.json")).parent
    image = str(min((goldens / "images").glob("*.png")))
    asked = [*of_checkpoint(goldens, folder), "--image", image, "--question", "What is it?"]
    assert generate.main([*asked, "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() or "cut off" not in said.err
