"""The evaluate command from its settings to its files: all benchmarks, resuming, judging, refusals."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest
import tokenizers
import transformers
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import evaluate, ready
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.evaluation import runner, settings
from moe_vlm_jax.models import vlm
from tests.evaluation import judging_test
from tests.evaluation.benchmarks import official

ROOT = pathlib.Path(__file__).parents[1]

# Every byte is a token, so that any prompt can be asked.
VOCABULARY = ["<pad>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
RUN = config_lib.RunConfig(
    model=config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            image_size=16, patch_size=8, embed_dim=12, mlp_dim=20, num_layers=2, num_heads=2
        ),
        decoder=config_lib.DecoderConfig(
            vocab_size=len(VOCABULARY),
            embed_dim=24,
            mlp_dim=36,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=12,
            rotary_dim=12,
            max_positions=2000,
            embed_init_std=0.7,
        ),
        moe=config_lib.MoEConfig(num_experts=(4,), block_rows=8),
        compute_dtype="float32",
        remat="none",
    ),
    data=config_lib.DataConfig(answer_prompt="(answer briefly)"),
    generation=config_lib.GenerationConfig(max_new_tokens=4),
)


def byte_tokenizer():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(VOCABULARY)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def weights():
    return nnx.split(vlm.VLM(RUN.model, rngs=nnx.Rngs(0)))


class Model:
    """A model in memory behind ready.from_workdir, that answers what the test says; counts loads and calls."""

    def __init__(self, weights):
        self.weights, self.loads, self.prompts, self.dies_after = weights, 0, [], -1
        self.says = lambda number, prompt: "yes"
        self.config, self.tokenizer = RUN, byte_tokenizer()
        self.transforms: list = []

    def source(self, workdir, *, mesh=None) -> ready.Source:
        transform = images_lib.transform_for(self.config.model.vision, self.config.data)
        return ready.Source(self.config, self.tokenizer, transform, self.load)

    def load(self):
        self.loads += 1
        return self.weights

    def answer(self, graphdef, params, config, images, prompts, tokenizer, transform):
        if len(self.transforms) == self.dies_after:
            raise KeyboardInterrupt
        self.transforms.append(transform)
        said = []
        for prompt in prompts:
            text = tokenizer.decode(prompt[prompt >= 0])
            said.append((self.says(len(self.prompts), text), True))
            self.prompts.append(text)
        return said


@pytest.fixture
def model(weights, monkeypatch, tmp_path) -> Model:
    made = Model(weights)
    monkeypatch.setattr(ready, "from_workdir", made.source)
    monkeypatch.setattr(runner, "answer_prompts", made.answer)
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "7" / "weights").write_text("x")
    return made


@pytest.fixture
def data(tmp_path) -> pathlib.Path:
    for folder, fill in official.ALL.values():
        fill(tmp_path / "data" / folder)
    official.mmbench(tmp_path / "data" / "mmbench", "mmbench_dev_cn_20231003.tsv")
    return tmp_path / "data"


def config(tmp_path, benchmarks: str, **values) -> settings.EvaluateConfig:
    fields = {"workdir": str(tmp_path / "run"), "data_root": str(tmp_path / "data"), "target": str(tmp_path / "out")}
    made = settings.EvaluateConfig(benchmarks=benchmarks, **(fields | values))
    for name in ("mmvet", "llavabench"):
        getattr(made, name).max_new_tokens = 8
    return made


def written(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def predictions(tmp_path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / name / "predictions.jsonl").read_text().splitlines()]


def test_all_benchmarks_run_and_leave_labelled_scores_and_submissions(tmp_path, data, model):
    names = [name for name in settings.NAMES if name != "embedded"]
    found = evaluate.evaluate(config(tmp_path, ",".join(names), judge="offline"))
    content = written(tmp_path)
    assert list(found) == list(content["benchmarks"]) == names
    labels = {name: part["label"] for name, part in content["benchmarks"].items()}
    assert labels["pope"] == "POPE test, mean F1 of the three splits, LLaVA rule"
    assert labels["mme"] == "MME test, perception, points of 2000, official tool's rule"
    assert labels["mmbench"] == (
        "MMBench dev, circular accuracy, rule matching only (no LLM extraction), mmbench_dev_20230712.tsv, llava "
        "prompt, VLMEvalKit rule"
    )
    assert labels["mmvet"].startswith("MM-Vet questions, scorer = share of")
    assert "NOT the GPT-4 MM-Vet score" in labels["mmvet"]
    assert "not comparable with GPT-4-judged numbers" in labels["llavabench"]
    assert all(label.endswith(" rule") for label in labels.values())
    incomparable = {name for name, part in content["benchmarks"].items() if not part["comparable"]}
    assert incomparable == {"mmbench", "mmbench_cn", "mmvet", "llavabench"}
    scores = {name: part["score"] for name, part in content["benchmarks"].items()}
    assert scores["pope"] == pytest.approx(200 / 3)  # 'yes' to everything: precision 1/2, recall 1
    assert scores["mme"] == 500.0  # ten categories with one of two right
    assert {scores[name] for name in ("infovqa", "docvqa", "scienceqa", "mmbench", "ai2d", "chartqa")} == {0.0}
    submissions = {name: part["submission"] for name, part in content["benchmarks"].items() if part["submission"]}
    assert submissions == {
        **dict.fromkeys(("infovqa", "docvqa", "vqav2", "vizwiz", "gqa", "mmvet"), "submission.json"),
        **dict.fromkeys(("mmbench", "mmbench_cn"), "submission.xlsx"),
        "llavabench": "submission.jsonl",
    }
    for name in names:
        rows = predictions(tmp_path, name)
        assert len(rows) == content["benchmarks"][name]["count"]
        assert all("score" in row and row["prediction"] == "yes" for row in rows)
        for image in (image for row in rows for image in row["images"]):
            assert (tmp_path / "out" / name / image).is_file()
        if submissions.get(name):
            assert (tmp_path / "out" / name / submissions[name]).is_file()
    manifest = content["manifest"]
    assert manifest["checkpoint"] | {"hash": "", "stamp": ""} == {
        **{"path": str(tmp_path / "run"), "kind": "workdir", "step": 7, "stamp": "", "hash": ""},
    }
    assert re.fullmatch(r"[0-9a-f]{16}", manifest["checkpoint"]["hash"])
    assert manifest["finished"] >= manifest["started"]
    assert 0 < manifest["parameters"]["activated"] < manifest["parameters"]["total"]
    assert not any(prompt.endswith("(answer briefly)\n") for prompt in model.prompts)


def test_the_embedded_set_is_asked_with_the_runs_own_prompt_and_length(tmp_path, model):
    made = config(tmp_path, "embedded", max_questions=6)
    made.embedded.path = str(tmp_path / "cache")
    model.says = lambda number, prompt: "sun"
    (found,) = evaluate.evaluate(made).values()
    assert found["count"] == 6
    assert found["label"].endswith("not InfographicVQA, VLMEvalKit rule, a draw of 6 of 4000 questions")
    assert not found["comparable"]
    assert all(prompt.strip().endswith("(answer briefly)") for prompt in model.prompts)


def test_a_killed_evaluation_goes_on_and_gives_the_same_files(tmp_path, data, model):
    model.says = lambda number, prompt: f"{len(prompt)}"
    whole = config(tmp_path, "pope,mme", chunk=4)
    evaluate.evaluate(dataclasses.replace(whole, target=str(tmp_path / "whole")))
    calls = len(model.transforms)
    model.dies_after = calls + 3
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(whole)
    assert not (tmp_path / "out" / "mme" / "submission.json").exists()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["finished"] is None
    model.dies_after = -1
    evaluate.evaluate(whole)
    assert len(model.transforms) - calls == calls  # no chunk was asked twice
    for name in ("pope", "mme"):
        files = [tmp_path / folder / name / "predictions.jsonl" for folder in ("out", "whole")]
        assert files[0].read_text() == files[1].read_text()
    assert (
        written(tmp_path)["benchmarks"] == json.loads((tmp_path / "whole" / "results.json").read_text())["benchmarks"]
    )
    loads = model.loads
    evaluate.evaluate(whole)
    assert model.loads == loads  # all is answered: no weights are read


def test_another_benchmark_is_added_to_a_folder_and_earlier_results_stay(tmp_path, data, model):
    evaluate.evaluate(config(tmp_path, "pope"))
    evaluate.evaluate(config(tmp_path, "gqa", batch_size=1))
    content = written(tmp_path)
    assert list(content["benchmarks"]) == ["pope", "gqa"]
    assert set(content["manifest"]["questions"]) == {"pope", "gqa"}
    assert "pope.rule" in content["manifest"]["config"]


def test_another_rule_other_questions_or_another_checkpoint_are_refused_and_named(tmp_path, data, model):
    made = config(tmp_path, "pope")
    evaluate.evaluate(made)
    other = config(tmp_path, "pope")
    other.pope.rule = "lmms_eval"
    with pytest.raises(ValueError, match=r"pope\.rule: 'llava' in the folder, 'lmms_eval' now"):
        evaluate.evaluate(other)
    with pytest.raises(ValueError, match="max_questions: 0 in the folder, 2 now"):
        evaluate.evaluate(config(tmp_path, "pope", max_questions=2))
    loads = model.loads
    asked = data / "pope" / "coco" / "coco_pope_popular.json"
    original = asked.read_text()
    asked.write_text(original.replace("a dog", "a cat"))
    with pytest.raises(ValueError, match="pope: its questions"):
        evaluate.evaluate(made)
    asked.write_text(original)
    assert model.loads == loads
    model.weights = (model.weights[0], jax.tree.map(lambda x: x * 2, model.weights[1]))
    (tmp_path / "run" / "checkpoints" / "9").mkdir()
    with pytest.raises(ValueError, match=r"another checkpoint: .* \(step 7, hash \w+\); now it is .* \(step 9, hash"):
        evaluate.evaluate(made)


def test_a_copy_of_the_same_weights_goes_on(tmp_path, data, model):
    made = config(tmp_path, "pope")
    evaluate.evaluate(made)
    (tmp_path / "run" / "checkpoints" / "7").rename(tmp_path / "run" / "checkpoints" / "8")
    evaluate.evaluate(made)
    assert written(tmp_path)["manifest"]["checkpoint"]["step"] == 8


def grade(prompt: str) -> str:
    return "0.5" if "Which?" in prompt else "1.0"


def endpoint(server, **values) -> settings.EndpointConfig:
    fields = {"url": server.url, "model": "gpt-4-0613", "key_variable": "", "attempts": 1, "wait": 0.0}
    return settings.EndpointConfig(**(fields | values))


def test_a_judge_grades_and_the_label_says_who_when_and_with_which_text(tmp_path, data, model):
    with judging_test.Server("1.0", "0.5") as server:
        made = config(tmp_path, "mmvet", judge="endpoint", endpoint=endpoint(server))
        (found,) = evaluate.evaluate(made).values()
    assert found["score"] == 75.0
    assert found["label"].startswith("MM-Vet questions, scorer = gpt-4-0613 (20")
    assert "this project's prompt; NOT the GPT-4 MM-Vet score" in found["label"]
    assert not found["comparable"]
    assert [row["score"] for row in predictions(tmp_path, "mmvet")] == [1.0, 0.5]
    assert (found["judge"]["served"], found["judge"]["judged"]) == (["judge-2024"], 2)


def test_with_the_official_model_and_text_grades_are_comparable(tmp_path, data, model):
    text = "Rules for <AND> and <OR>.\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---"
    given = official.write(tmp_path / "grader.txt", text)
    with judging_test.Server("1.0", "0.5") as server:
        made = config(tmp_path, "mmvet", judge="endpoint", endpoint=endpoint(server))
        made.mmvet.judge_prompt = str(given)
        (found,) = evaluate.evaluate(made).values()
    assert found["comparable"]
    assert "official prompt" in found["label"]
    assert "NOT" not in found["label"]


def test_an_unjudged_answer_leaves_no_score_and_the_same_command_judges_it(tmp_path, data, model, capsys):
    with judging_test.Server("1.0", 500) as server:
        made = config(tmp_path, "mmvet", judge="endpoint", endpoint=endpoint(server))
        with pytest.raises(SystemExit) as ended:
            evaluate.run(made)
        assert ended.value.code == 3
        said = capsys.readouterr()
        assert "mmvet: answers are unjudged" in said.err
        assert "NOT SCORED: 1 of 2 answers are unjudged" in said.out
        part = written(tmp_path)["benchmarks"]["mmvet"]
        assert (part["score"], part["scores"], part["judge"]["failed"]) == (None, {}, 1)
        assert [row["score"] for row in predictions(tmp_path, "mmvet")] == [1.0, None]
        loads = model.loads
        server.replies = ["0.5"]
        evaluate.run(made)
    assert written(tmp_path)["benchmarks"]["mmvet"]["score"] == 75.0
    assert model.loads == loads
    assert len(server.requests) == 3


def test_answers_can_be_written_first_and_judged_later(tmp_path, data, model):
    (found,) = evaluate.evaluate(config(tmp_path, "mmvet", judge="none")).values()
    assert (found["score"], found["submission"]) == (None, "submission.json")
    assert found["label"].startswith("MM-Vet test, NOT SCORED: judge='none'")
    loads = model.loads
    with judging_test.Server("1.0", "0.5") as server:
        (found,) = evaluate.evaluate(config(tmp_path, "mmvet", judge="endpoint", endpoint=endpoint(server))).values()
    assert (found["score"], model.loads) == (75.0, loads)


def test_a_missing_key_or_judges_text_is_found_before_anything_is_loaded(tmp_path, data, model, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with judging_test.Server() as server:
        made = config(tmp_path, "mmvet", judge="endpoint", endpoint=endpoint(server, key_variable="JUDGE_KEY"))
        with pytest.raises(ValueError, match=r"endpoint\.key_variable='JUDGE_KEY' is not set"):
            evaluate.evaluate(made)
        made = config(tmp_path, "llavabench", judge="endpoint", endpoint=endpoint(server))
        made.llavabench.judge_prompt = str(tmp_path / "rule.json")
        with pytest.raises(ValueError, match=r"rule\.json"):
            evaluate.evaluate(made)
        assert not server.requests
    assert model.loads == 0
    assert not (tmp_path / "out").exists()


def test_unpadded_images_are_an_option_of_three_sets_and_said_in_the_label(tmp_path, data, model):
    made = config(tmp_path, "scienceqa")
    assert evaluate.evaluate(made)["scienceqa"]["label"] == "ScienceQA test, IMG accuracy, LLaVA rule"
    made.scienceqa.unpadded_images, made.target = True, str(tmp_path / "unpadded")
    found = evaluate.evaluate(made)["scienceqa"]
    assert "images not padded, as in MoE-LLaVA's script" in found["label"]
    assert [transform.aspect for transform in model.transforms] == ["pad", "square"]
    having = {name for name in settings.NAMES if hasattr(getattr(made, name), "unpadded_images")}
    assert having == {"scienceqa", "mmvet", "llavabench"}
    model.config = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, image_aspect="square"))
    with pytest.raises(ValueError, match=r"scienceqa\.unpadded_images has no effect"):
        evaluate.evaluate(made)


def test_a_missing_image_stops_before_the_weights_or_is_left_out_and_said(tmp_path, data, model):
    (data / "vizwiz" / "val" / "VizWiz_val_00000001.jpg").unlink()
    with pytest.raises(ValueError, match=r"VizWiz_val_00000001\.jpg' does not exist; vizwiz needs it"):
        evaluate.evaluate(config(tmp_path, "vizwiz"))
    assert model.loads == 0
    (found,) = evaluate.evaluate(config(tmp_path, "vizwiz", on_bad_sample="drop")).values()
    assert (found["count"], found["skipped"]) == (1, {"missing_image": 1})
    assert found["label"].endswith("VizWiz val, VQA accuracy, LLaVA rule, left out: 1")
    assert (found["comparable"], found["submission"]) == (False, None)


def test_every_sets_files_are_looked_for_before_the_weights(tmp_path, data, model):
    (data / "gqa" / "testdev_balanced_questions.json").unlink()
    with pytest.raises(ValueError, match=r"GQA testdev_balanced: .*data/gqa.*testdev_balanced_questions\.json"):
        evaluate.evaluate(config(tmp_path, "pope,gqa"))
    assert model.loads == 0
    assert not (tmp_path / "out").exists()


def test_the_target_is_not_a_runs_own_folder(tmp_path, data, model):
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is the workdir of a run"):
        evaluate.evaluate(config(tmp_path, "pope", target=str(tmp_path / "run")))
    assert evaluate.target_of(config(tmp_path, "pope", target="")) == tmp_path / "run" / "evaluation"
