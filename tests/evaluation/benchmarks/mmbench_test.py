"""MMBench: base64 images in a table, rotations, and the sheet for the server."""

import csv
import dataclasses

import pandas
import pytest

from moe_vlm_jax.evaluation.benchmarks import catalogue, mmbench
from tests.evaluation.benchmarks import loading, official


def test_the_table_is_read_with_tabs_and_breaks_inside_cells(tmp_path):
    first, second, rotated = loading.load("mmbench", official.mmbench(tmp_path))
    assert first.prompt == (
        "Which is\tit?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert second.prompt.startswith('Look,\nagain.\nThe "best"?\nA. 1\n')
    assert (first.unit, rotated.unit, rotated.id) == ("241", "241", "1000241")
    assert first.images == rotated.images == (official.picture(11),)
    assert first.group == {"category": "identity_reasoning", "l2_category": "attribute_reasoning"}


def test_pandas_reads_the_same_cells(tmp_path):
    path = official.mmbench(tmp_path)
    table = pandas.read_csv(path / "mmbench_dev_20230712.tsv", sep="\t", keep_default_na=False, dtype=str)
    found = loading.load("mmbench", path)
    assert [question.asked for question in found] == table["question"].tolist()
    assert [question.fields["options"].get("B") for question in found] == table["B"].tolist()


def test_other_prompts_are_a_setting_of_their_own(tmp_path):
    path = official.mmbench(tmp_path)
    kit = loading.load("mmbench", path, prompt="vlmevalkit")[1].prompt
    assert kit.startswith('Hint: Look,\nagain.\nQuestion: The "best"?\nOptions:\nA. 1\n')
    assert "Hint" not in loading.load("mmbench", path, prompt="vlmevalkit")[0].prompt


def test_the_chinese_set_has_its_own_request(tmp_path):
    path = official.mmbench(tmp_path, "mmbench_dev_cn_20231003.tsv")
    assert loading.load("mmbench_cn", path)[0].prompt.endswith("\n请直接回答选项字母。")
    with pytest.raises(ValueError, match=r"MMBench dev \(en\): .*mmbench_dev_20230712\.tsv"):
        loading.load("mmbench", path)


def test_a_question_is_right_only_if_every_rotation_is(tmp_path):
    path = official.mmbench(tmp_path)
    found = loading.score("mmbench", path, ["B", "D", "The answer is A"], tmp_path)
    assert found.score == 100.0
    assert "mmbench_dev_20230712.tsv" in found.note
    half = loading.score("mmbench", path, ["B", "D. 4", "B"], tmp_path)
    assert (half.score, half.scores["accuracy of the first rotations"]) == (50.0, 100.0)
    assert half.scores["by l2 category"] == {"attribute_reasoning": 0.0, "perception": 100.0}
    assert [field["matched"] for field in half.fields] == ["B", "D", "B"]


def test_a_file_without_rotations_is_not_called_circular(tmp_path):
    path = official.mmbench(tmp_path)
    made = loading.rows(loading.load("mmbench", path)[:2], ["B", "D"], tmp_path)
    found = mmbench.score(made, loading.config("mmbench"))
    assert "NOT circular" in found.metric
    assert not found.comparable


def test_a_judges_letter_counts_where_the_rules_find_none(tmp_path):
    path, config = official.mmbench(tmp_path), loading.config("mmbench")
    made = loading.rows(loading.load("mmbench", path), ["the animal that barks", "D", "a barker"], tmp_path)
    assert [mmbench.JUDGE.needed(row, config) for row in made] == [True, False, True]
    assert mmbench.score(made, config).score == 50.0
    judged = [made[0] | {"verdict": "B"}, made[1] | {"verdict": None}, made[2] | {"verdict": "A"}]
    assert mmbench.score(judged, config).score == 100.0
    judged[2]["verdict"] = "Z"
    assert mmbench.score(judged, config).score == 50.0
    assert "the animal that barks" in mmbench.JUDGE.prompt(made[0], config)
    assert [mmbench.JUDGE.parse(reply, config) for reply in ("B", " (Z).", "B or C", "bee")] == ["B", "Z", None, None]


def test_the_submission_is_the_table_without_what_the_server_has_and_with_the_prediction_seventh(tmp_path):
    path = official.mmbench(tmp_path, "mmbench_test_en_20231003.tsv", answers=False)
    config = loading.config("mmbench", split="test")
    made = loading.rows(loading.load("mmbench", path, split="test"), ["B", "007", "a\tb\n\x07<"], tmp_path)
    assert mmbench.score(made, config).score is None
    name = catalogue.BENCHMARKS["mmbench"].write_submission(tmp_path, made, config, path)
    assert name == "submission.xlsx"
    with (tmp_path / "submission.tsv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file, delimiter="\t"))
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [row[6] for row in table[1:]] == ["B", "007", "a\tb\n\x07<"]
    assert table[2][:6] == ["252", 'The "best"?', "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("252\t", "x\t"), r"index='x' must be a number"),
        (lambda text: text.replace("\tD\tocr", "\tE\tocr"), r"answer='E' is none of its options ABCD"),
        (lambda text: text.replace("241\t", "242\t", 1), "the file has no row 241"),
        (lambda text: text.replace("\tocr\t", "\tocr\t$"), "is not base64"),
        (lambda text: text + "7\tshort\n", "not as many cells as the header"),
    ],
)
def test_a_broken_row_is_named(tmp_path, change, message):
    file = official.mmbench(tmp_path) / "mmbench_dev_20230712.tsv"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=rf"mmbench_dev_20230712\.tsv:\d+: .*{message}"):
        loading.load("mmbench", file)


def test_the_defaults_are_those_of_the_primary_rule():
    assert dataclasses.asdict(loading.config("mmbench")) == {
        "path": "",
        "split": "dev",
        "rule": "vlmevalkit",
        "max_new_tokens": 128,
        "prompt": "llava",
    }
