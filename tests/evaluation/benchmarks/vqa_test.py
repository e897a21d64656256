"""VQAv2, VizWiz and TextVQA: files, prompts, soft accuracy worked by hand, and EvalAI's files."""

import json

import pytest

from moe_vlm_jax.evaluation.benchmarks import catalogue
from tests.evaluation.benchmarks import loading, official

SHORTLY = "\nAnswer the question using a single word or phrase."


def test_vqav2_pairs_questions_with_annotations_by_id_not_by_order(tmp_path):
    first, second = loading.load("vqav2", official.vqav2(tmp_path))
    assert (first.id, first.group["answer_type"], first.answers[:3]) == ("262148000", "other", ("up", "up", "down"))
    assert second.answers.count("yes") == 9
    assert first.prompt == "Where is he looking?" + SHORTLY
    assert first.images == (str(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg"),)


def test_soft_accuracy_is_that_of_the_leave_one_out_formula(tmp_path):
    # 2 of 10 people said up: 2 * min(1/3, 1) and 8 * min(2/3, 1), over 10; 9 said yes: 1.
    found = loading.score("vqav2", official.vqav2(tmp_path), ["Up.", "yes"], tmp_path)
    assert [field["score"] for field in found.fields] == pytest.approx([0.6, 1.0])
    assert found.score == pytest.approx(80.0)
    assert found.scores["by answer type"] == pytest.approx({"other": 60.0, "yes/no": 100.0})


def test_a_submission_for_test_dev_holds_every_question_of_test2015_normalised(tmp_path):
    path = official.vqav2(tmp_path)
    config = loading.config("vqav2", split="test-dev2015")
    made = loading.rows(loading.load("vqav2", path, split="test-dev2015"), ["The Dog."], tmp_path)
    assert made[0]["images"][0].endswith("COCO_test2015_000000000001.jpg")
    name = catalogue.BENCHMARKS["vqav2"].write_submission(tmp_path, made, config, path)
    assert json.loads((tmp_path / name).read_text()) == [
        {"question_id": 1000, "answer": "dog"},
        {"question_id": 2000, "answer": ""},
    ]


def test_vizwiz_says_what_to_answer_when_the_picture_does_not_tell(tmp_path):
    path = official.vizwiz(tmp_path)
    first, _ = loading.load("vizwiz", path)
    assert first.prompt == (
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORTLY
    )
    found = loading.score("vizwiz", path, ["basil", "Unanswerable"], tmp_path)
    assert found.score == 50.0
    made = loading.rows(loading.load("vizwiz", path), ["A basil!", "Unanswerable"], tmp_path)
    name = catalogue.BENCHMARKS["vizwiz"].write_submission(tmp_path, made, loading.config("vizwiz"), path)
    assert json.loads((tmp_path / name).read_text())[0] == {"image": "VizWiz_val_00000000.jpg", "answer": "basil"}


def test_textvqa_has_ocr_tokens_in_the_prompt_as_llava_has_and_the_label_says_so(tmp_path):
    path = official.textvqa(tmp_path)
    (question,) = loading.load("textvqa", path)
    assert question.prompt == "What is the brand?\nReference OCR token: NOKIA, 3310" + SHORTLY
    found = loading.score("textvqa", path, ["Nokia"], tmp_path)
    assert (found.score, found.note, found.comparable) == (100.0, "with OCR tokens in the prompt", True)
    (bare,) = loading.load("textvqa", path, ocr_tokens="no")
    assert bare.prompt == "What is the brand?" + SHORTLY
    without = loading.score("textvqa", path, ["nokla"], tmp_path, ocr_tokens="no")
    assert (without.score, without.comparable) == (pytest.approx(30.0), False)  # one of ten: 9/10 * 1/3
    (capital,) = loading.load("textvqa", path, rule="lmms_eval")
    assert capital.prompt == "What is the brand?" + SHORTLY


def test_llavas_stored_prompts_of_textvqa_are_asked_as_they_are(tmp_path):
    path = official.textvqa(tmp_path)
    prompt = "What is the brand?\nReference OCR token: NOK, IA\nAnswer the question using a single word or phrase."
    stored = [{"question_id": "003a8ae2ef43b901", "image": "003a8ae2ef43b901.jpg", "text": prompt}]
    official.write(path / "llava_textvqa_val_v051_ocr.jsonl", stored)
    assert loading.load("textvqa", path)[0].prompt == prompt
    stored[0]["question_id"] = "other"
    official.write(path / "llava_textvqa_val_v051_ocr.jsonl", stored)
    with pytest.raises(ValueError, match="has no OCR"):
        loading.load("textvqa", path)


def test_missing_ocr_says_how_to_go_without(tmp_path):
    path = official.textvqa(tmp_path)
    (path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(ValueError, match=r"TextVQA_Rosetta_OCR.*llava_textvqa.*ocr_tokens=no"):
        loading.load("textvqa", path)


def test_llavas_formula_wants_ten_answers_and_says_so_before_anything_is_asked(tmp_path):
    path = official.textvqa(tmp_path)
    content = json.loads((path / "TextVQA_0.5.1_val.json").read_text())
    content["data"][0]["answers"].pop()
    official.write(path / "TextVQA_0.5.1_val.json", content)
    with pytest.raises(ValueError, match=r"data\[0\]: 9 answers, but rule 'llava' takes 10"):
        loading.load("textvqa", path)
    assert len(loading.load("textvqa", path, rule="vlmevalkit")[0].answers) == 9


def test_a_question_without_annotation_is_an_error(tmp_path):
    path = official.vqav2(tmp_path)
    file = path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    official.write(file, {"annotations": content["annotations"][:1]})
    with pytest.raises(ValueError, match=r"questions\[0\]: question_id=262148000 has no annotation"):
        loading.load("vqav2", path)
