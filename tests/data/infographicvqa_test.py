"""InfographicVQA: every folder layout, spelling and mirror that is in use, and what is wrong with a broken one."""

import io
import json

import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, infographicvqa, sources

PICTURE = io.BytesIO()
Image.new("RGB", (6, 4)).save(PICTURE, "JPEG")

# The examples of the published files.
TRAIN = {
    "questionId": 65718,
    "question": "Which type of fonts offer better readability in printed works?",
    "image_local_name": "20471.jpeg",
    "image_url": "https://example.org/20471.jpg",
    "ocr_output_file": "20471.json",
    "answers": ["serif fonts", "serif"],
    "data_split": "train",
}
VAL = TRAIN | {
    "questionId": 98313,
    "answers": ["pinterest"],
    "answer_type": ["single span"],
    "evidence": ["text"],
    "operation/reasoning": [],
}
TEST = {key: value for key, value in TRAIN.items() if key != "answers"}
LAYOUTS = [
    ("qas", "images"),
    ("question_answer", "images"),
    ("infographicsvqa_qas", "infographicsvqa_images"),
    (".", "images"),
    ("QAS", "Images"),
]


def write(root, name, rows, questions="qas", images="images", pictures=("20471.jpeg",)):
    (root / questions).mkdir(exist_ok=True, parents=True)
    (root / images).mkdir(exist_ok=True)
    content = {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": "train", "data": rows}
    (root / questions / name).write_text(json.dumps(content), encoding="utf-8")
    for picture in pictures:
        (root / images / picture).write_bytes(PICTURE.getvalue())
    return root


def load(path, split, **kwargs):
    return sources.load_records(config_lib.DataConfig(source="infographicvqa", path=str(path), **kwargs), split)


@pytest.mark.parametrize(("questions", "images"), LAYOUTS)
@pytest.mark.parametrize("spelling", ["infographicsVQA", "infographicVQA", "infographicsvqa"])
def test_every_layout_and_spelling_is_found(tmp_path, questions, images, spelling):
    write(tmp_path, f"{spelling}_train_v1.0.json", [TRAIN], questions, images)
    (record,) = load(tmp_path, "train")
    assert record.id == "65718"
    assert record.images == (str(tmp_path / images / "20471.jpeg"),)
    assert [turn.text for turn in record.turns] == [f"<image>\n{TRAIN['question']}", "serif fonts"]
    assert record.answers == ("serif fonts", "serif")


def test_the_file_with_question_types_is_preferred_and_its_words_are_unified(tmp_path):
    write(tmp_path, "infographicsVQA_val_v1.0.json", [VAL | {"question": "old?"}])
    types = [["single span"], ["question span", "Multiple Spans"], ["riddle"], [], "non span"]
    rows = [VAL | {"questionId": i, "answer_type": kinds} for i, kinds in enumerate(types)]
    write(tmp_path, "infographicsVQA_val_v1.0_withQT.json", rows)
    found = load(tmp_path, "val")
    found_types = [record.answer_type for record in found]
    assert found_types == ["image-span", "question-span+multi-span", "riddle", "", "non-extractive"]


def test_test_questions_have_no_answer_and_can_only_be_asked(tmp_path):
    write(tmp_path, "infographicsVQA_test_v1.0.json", [TEST])
    (record,) = load(tmp_path, "test")
    assert record.answers == () and [turn.role for turn in record.turns] == ["human"]


@pytest.mark.parametrize(("named", "stored"), [("20471.jpeg", "20471.JPEG"), ("20471.JPEG", "20471.jpeg")])
def test_image_names_differing_in_case_are_found(tmp_path, named, stored):
    row = TRAIN | {"image_local_name": named}
    write(tmp_path, "infographicsVQA_train_v1.0.json", [row], pictures=[stored])
    assert load(tmp_path, "train")[0].images[0].endswith(stored)


def test_counts_that_are_not_the_official_ones_are_reported_with_both(tmp_path, caplog):
    write(tmp_path, "infographicsVQA_val_v1.0.json", [VAL, VAL | {"questionId": 2}])
    with caplog.at_level("WARNING"):
        load(tmp_path, "val")
    assert "InfographicVQA val: 2 questions on 1 images; the official split has 2801 on 500." in caplog.text


@pytest.mark.parametrize(("split", "counts"), infographicvqa.OFFICIAL_COUNTS.items())
def test_the_official_counts_raise_no_warning(tmp_path, caplog, split, counts):
    questions, images = counts
    names = [f"{i % images}.jpeg" for i in range(questions)]
    rows = [TEST | {"questionId": i, "image_local_name": name} for i, name in enumerate(names)]
    write(tmp_path, f"infographicsVQA_{split}_v1.0.json", rows, pictures=[])
    for name in set(names):
        (tmp_path / "images" / name).touch()
    with caplog.at_level("WARNING"):
        assert len(load(tmp_path, split)) == questions
    assert "official" not in caplog.text


def test_a_missing_picture_stops_the_run_or_is_left_out_by_config(tmp_path):
    rows = [TRAIN, TRAIN | {"questionId": 2, "image_local_name": "7.jpeg"}]
    write(tmp_path, "infographicsVQA_train_v1.0.json", rows)
    with pytest.raises(bad_samples.SampleError, match=r"_v1\.0\.json\[1\]': image file '7\.jpeg' does not exist in"):
        load(tmp_path, "train")
    assert [record.id for record in load(tmp_path, "train", on_bad_sample="drop")] == ["65718"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question=' ', questionId=65718; both are needed"),
        ({"questionId": None}, "questionId=None; both are needed"),
        ({"answers": "serif"}, "answers='serif'; it must be a list of texts"),
        ({"answers": 3}, "answers=3; it must be a list of texts"),
        ({"answers": [3]}, r"answers=\[3\]; it must be a list of texts"),
        ({"image_local_name": None}, "it needs image_local_name, question and questionId; mend it"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, message):
    write(tmp_path, "infographicsVQA_train_v1.0.json", [TRAIN | change])
    with pytest.raises(bad_samples.SampleError, match=rf"train_v1\.0\.json\[0\]': .*{message}"):
        load(tmp_path, "train")


def test_question_ids_must_differ(tmp_path):
    write(tmp_path, "infographicsVQA_train_v1.0.json", [TRAIN, TRAIN])
    with pytest.raises(bad_samples.SampleError, match="sample '65718': its id occurs twice; ids must differ"):
        load(tmp_path, "train")


def test_a_folder_without_the_split_is_refused_with_what_it_holds(tmp_path):
    write(tmp_path, "infographicsVQA_train_v1.0.json", [TRAIN])
    with pytest.raises(
        ValueError, match=r"no infographicsVQA_val_v\*\.json; it must be laid out as .*\['images', 'qas'"
    ):
        load(tmp_path, "val")
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "none", "val")
    with pytest.raises(ValueError, match="no split 'dev'; use train, val, test"):
        load(tmp_path, "dev")


def test_a_file_that_is_not_a_question_file_is_refused(tmp_path):
    write(tmp_path, "infographicsVQA_train_v1.0.json", [TRAIN])
    (tmp_path / "qas" / "infographicsVQA_train_v1.0.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="needs 'dataset_name' and 'data'"):
        load(tmp_path, "train")


def mirror(folder, name, answers=(("serif fonts", "serif"), None)):
    """Writes a file with the columns of the mirror: two questions about one picture."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the optional extra 'parquet', is not installed")
    from pyarrow import parquet

    rows = [
        {
            "questionId": str(100 + i),
            "question": TRAIN["question"],
            "answers": None if values is None else list(values),
            "answer_type": None if values is None else ["single span"],
            "image": {"bytes": PICTURE.getvalue(), "path": None},
            "image_url": TRAIN["image_url"],
            "operation/reasoning": None,
            "ocr": "{}",
            "data_split": "val",
        }
        for i, values in enumerate(answers)
    ]
    folder.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def test_the_mirrors_parquet_files_are_read_from_a_folder_or_by_name(tmp_path):
    file = mirror(tmp_path / "InfographicVQA", "validation-00000-of-00001.parquet")
    for path in (tmp_path, tmp_path / "InfographicVQA", file):
        first, second = load(path, "val")
        assert (first.id, first.answers, first.answer_type) == ("100", ("serif fonts", "serif"), "image-span")
        assert second.answers == () and len(second.turns) == 1
        assert first.images[0] == PICTURE.getvalue() and first.images[0] is second.images[0]


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the optional extra 'parquet', is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"has no columns \['image', 'image_url', 'questionId'\]"):
        load(tmp_path / "a.parquet", "val")
    with pytest.raises(ValueError, match=r"'.*b\.parquet', which does not exist"):
        load(tmp_path / "b.parquet", "val")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"which needs pyarrow; install it \(pip install moe_vlm_jax\[parquet\]\)"):
        load(tmp_path / "a.parquet", "val")
