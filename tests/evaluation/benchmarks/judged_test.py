"""MM-Vet and LLaVA-Bench: files, what a judge is told, offline stand-ins, and submissions."""

import json

import pytest

from moe_vlm_jax.evaluation.benchmarks import catalogue, judged
from tests.evaluation.benchmarks import loading, official


def test_mmvet_is_read_and_asked_without_anything_around_the_question(tmp_path):
    first, second = loading.load("mmvet", official.mmvet(tmp_path))
    assert (first.id, first.prompt, first.answers) == ("v1_0", "What is x?", ("-1<AND>-5",))
    assert first.group == {"capability": ["ocr", "math"]}
    assert loading.load("mmvet", tmp_path, rule="lmms_eval")[1].prompt.endswith(
        "step by step to provide best answer to the following question: \n\nWhich?"
    )
    assert second.images == (str(tmp_path / "images" / "v1_0.png"),)


def test_a_capability_that_mmvet_does_not_have_is_named(tmp_path):
    path = official.mmvet(tmp_path)
    (path / "mm-vet.json").write_text((path / "mm-vet.json").read_text().replace('"math"', '"maths"'))
    with pytest.raises(ValueError, match=r"'v1_0': capability=\['ocr', 'maths'\] must be some of rec, ocr"):
        loading.load("mmvet", path)


def test_mmvets_total_and_capabilities_come_from_verdicts_and_one_missing_leaves_none(tmp_path):
    config = loading.config("mmvet")
    made = loading.rows(loading.load("mmvet", official.mmvet(tmp_path)), ["-1", "two"], tmp_path)
    rows = [made[0] | {"verdict": 0.5}, made[1] | {"verdict": 1.0}]
    found = judged.score_mmvet(rows, config)
    assert found.score == 75.0
    assert found.scores["by capability"] == {"rec": 100.0, "ocr": 50.0, "math": 50.0}
    assert [field["score"] for field in found.fields] == [0.5, 1.0]
    rows[1]["verdict"] = None
    missing = judged.score_mmvet(rows, config)
    assert (missing.score, missing.scores, missing.fields[1]) == (None, {}, {"score": None})
    rows[1]["verdict"] = 0.0  # a grade, not a missing one
    assert judged.score_mmvet(rows, config).score == 25.0


def test_the_grader_gets_the_given_text_in_front_of_the_row(tmp_path):
    row = loading.rows(loading.load("mmvet", official.mmvet(tmp_path)), ["x = -1", ""], tmp_path)[0]
    own = judged.MMVET.prompt(row, loading.config("mmvet"))
    assert own.endswith("What is x? | -1 <AND> -5 | x = -1 | ")
    given = official.write(tmp_path / "grader.txt", "Grade <AND> and <OR>.\nQuestion | Ground truth | Prediction | C")
    config = loading.config("mmvet", judge_prompt=str(given))
    assert judged.MMVET.prompt(row, config).startswith("Grade <AND> and <OR>.\nQuestion | Ground")
    assert judged.MMVET.retry_prompt(row, config) != judged.MMVET.prompt(row, config)
    assert [judged.MMVET.parse(reply, config) for reply in ("0.7", "seven")] == [0.7, None]
    with pytest.raises(ValueError, match=r"judge_prompt='none\.txt' is no file"):
        judged.MMVET.prompt(row, loading.config("mmvet", judge_prompt="none.txt"))


def test_the_offline_grade_is_the_share_of_parts_contained_as_words():
    def grade(answer, prediction):
        return judged.contained({"answers": [answer], "prediction": prediction})

    assert grade("two<OR>2", "There are 2.") == 1.0
    assert grade("2", "There are 12.") == 0.0
    assert grade("-1<AND>-5", "x is -1") == 0.5
    assert grade("red Car", "a RED car!") == 1.0


def test_mmvets_submission_is_answers_by_id(tmp_path):
    path = official.mmvet(tmp_path)
    made = loading.rows(loading.load("mmvet", path), ["a", "b"], tmp_path)
    name = catalogue.BENCHMARKS["mmvet"].write_submission(tmp_path, made, loading.config("mmvet"), path)
    assert json.loads((tmp_path / name).read_text()) == {"v1_0": "a", "v1_1": "b"}


def test_llavabench_pairs_questions_captions_and_references(tmp_path):
    path = official.llavabench(tmp_path)
    first, second = loading.load("llavabench", path)
    assert (first.id, first.prompt, first.answers) == ("0", "Question 0?", ("It is answer 0.",))
    assert second.fields == {"context": "A stunning view of Diamond Head."}
    assert second.group == {"category": "detail"}
    said = [{"question_id": i, "text": "x"} for i in (1, 0)]
    official.write(path / "answers_gpt4.jsonl", said)
    with pytest.raises(ValueError, match=r"answers_gpt4\.jsonl:1: question_id=1, but .*questions\.jsonl:1"):
        loading.load("llavabench", path)
    official.write(path / "answers_gpt4.jsonl", said[:1])
    with pytest.raises(ValueError, match=r"2 questions, but answers_gpt4\.jsonl has 1"):
        loading.load("llavabench", path)


def test_the_relative_score_is_a_ratio_of_means(tmp_path):
    made = loading.rows(loading.load("llavabench", official.llavabench(tmp_path)), ["a", "b"], tmp_path)
    rows = [made[0] | {"verdict": [10.0, 5.0]}, made[1] | {"verdict": [8.0, 8.0]}]
    found = judged.score_llavabench(rows, loading.config("llavabench"))
    assert found.score == 72.2  # 13 / 18; the mean of ratios would be 75
    assert found.scores["detail"] == {"relative": 100.0, "reference": 80.0, "model": 80.0}
    assert [field["score"] for field in found.fields] == [0.5, 0.8]


def test_the_reviewer_sees_the_caption_both_answers_and_the_categorys_rubric(tmp_path):
    row = loading.rows(loading.load("llavabench", official.llavabench(tmp_path)), ["mine", ""], tmp_path)[0]
    rule = {
        "llava_bench_conv": {"role": "Helper", "prompt": "Mark them."},
        "llava_bench_detail": {"role": "x", "prompt": "y"},
    }
    config = loading.config("llavabench", judge_prompt=str(official.write(tmp_path / "rule.json", rule)))
    assert judged.LLAVABENCH.prompt(row, config) == (
        "[Context]\nA stunning view of Diamond Head.\n\n[Question]\nQuestion 0?\n\n"
        "[Helper 1]\nIt is answer 0.\n\n[End of Helper 1]\n\n[Helper 2]\nmine\n\n[End of Helper 2]\n\n"
        "[System]\nMark them.\n\n"
    )
    parsed = [judged.LLAVABENCH.parse(reply, config) for reply in ("8 9\nBecause", "9, 8", "nan 8", "80 90")]
    assert parsed == [[8.0, 9.0], None, None, None]
    with pytest.raises(ValueError, match=r"rule\.json: 'llava_bench_complex'"):
        judged.LLAVABENCH.prompt(row | {"group": {"category": "complex"}}, config)


def test_the_offline_review_is_ten_times_the_f1_of_words():
    assert judged.overlap({"answers": ["a b c d"], "prediction": "b A x x x"}) == [10.0, pytest.approx(10 * 4 / 9)]
    assert judged.overlap({"answers": ["a"], "prediction": ""}) == [10.0, 0.0]
