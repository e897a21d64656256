"""Reading official files: what is looked for, and errors that name file, line and remedy."""

import pytest

from moe_vlm_jax.evaluation.benchmarks import files
from tests.evaluation.benchmarks import official


def test_the_first_name_that_is_there_is_taken_in_any_case(tmp_path):
    official.write(tmp_path / "QAS" / "Val_v1.json", {})
    official.write(tmp_path / "qas2" / "val_v1.json", {})
    found = files.find(tmp_path, ["val_v1.json", "qas/val_v1.json", "qas2/val_v1.json"], what="X")
    assert found == tmp_path / "QAS" / "Val_v1.json"
    assert files.find_any(tmp_path, ["other.json"]) is None


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "does not exist"), ("file", "is no folder"), ("full", r"holds \['0', '1', .* and 4 more")],
)
def test_what_is_missing_is_named_beside_what_is_there(tmp_path, folder, message):
    official.write(tmp_path / "file", "")
    for i in range(12):
        official.write(tmp_path / "full" / str(i), "")
    with pytest.raises(ValueError, match=rf"X val: .*{folder}' {message}.*must hold a\.json or b/a\.json.*data_root"):
        files.find(tmp_path / folder, ["a.json", "b/a.json"], what="X val")
    with pytest.raises(ValueError, match=r"must hold the images in images or pics"):
        files.find_folder(tmp_path / folder, ("images", "pics"), what="X")


def test_a_document_or_line_of_another_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: the document is a list, not a dict"):
        files.read_json(official.write(tmp_path / "a.json", []), dict)
    with pytest.raises(ValueError, match=r"b\.jsonl:2: .*must be one JSON object"):
        list(files.read_lines(official.write(tmp_path / "b.jsonl", [{}, []])))
    with pytest.raises(ValueError, match=r"c\.tsv: not a tab-separated table in UTF-8"):
        list(files.read_table(official.write(tmp_path / "c.tsv", b"a\tb\n\xff\t1\n")))


def test_a_cell_may_be_longer_than_the_csv_module_likes(tmp_path):
    import csv

    before = csv.field_size_limit()
    table = list(files.read_table(official.write(tmp_path / "a.tsv", "image\tb\n" + "x" * 200_000 + "\t1\n")))
    assert [(len(row["image"]), row["b"]) for _, row in table] == [(200_000, "1")]
    assert csv.field_size_limit() == before


def test_a_field_must_be_there_and_of_its_kind():
    assert files.get({"a": 1}, "a", (int, str), "f:1") == 1
    assert files.texts({"a": ["x"]}, "a", "f:1") == ("x",)
    assert files.texts({}, "a", "f:1") == ()
    for row in ({}, {"a": None}, {"a": True}, ["a"]):
        with pytest.raises(ValueError, match=r"f:1: a=.* must be of type int or str; mend the row"):
            files.get(row, "a", (int, str), "f:1")
    with pytest.raises(ValueError, match="must be a list of texts"):
        files.texts({"a": [1]}, "a", "f:1")
