"""LLaVA's JSON: from the reference's own rows to ids and pixels, and every row of an unknown shape."""

import functools
import json

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, images, llava, sources, tokenize
from tests.conftest import goldens_folder

GOOD = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "b"}],
}


def config(path, folder="", **kwargs):
    return config_lib.DataConfig(source="llava", path=str(path), image_folder=str(folder), **kwargs)


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@functools.cache
def golden_arrays():
    with np.load(goldens_folder() / "images" / "images.npz") as found:
        return dict(found)


@functools.cache
def golden_records():
    folder = goldens_folder() / "images"
    return sources.load_records(config(folder / "data.json", folder), "train")


def golden_items():
    return sorted(int(key.split(".")[1]) for key in golden_arrays() if key.endswith(".input_ids"))


@pytest.mark.goldens
@pytest.mark.parametrize("item", golden_items())
def test_rows_become_exactly_the_references_dataset_items(item):
    folder = goldens_folder()
    tokenizer = tokenize.load_tokenizer(str(folder / "preprocess" / "tokenizer_gpt2"))
    example = tokenize.encode(golden_records()[item], tokenizer, "phi", max_text_tokens=tokenizer.model_max_length)
    assert example.tokens.tolist() == golden_arrays()[f"ds.{item}.input_ids"].tolist()
    assert example.labels.tolist() == golden_arrays()[f"ds.{item}.labels"].tolist()
    transform = images.transform_from_hf(folder / "images" / "clip56", aspect="pad", max_pixels=10**6)
    pixels = [transform(image).transpose(2, 0, 1) for image in example.images]
    # Single pictures are not stored a second time: they are those of clip56_pad.
    expected = golden_arrays().get(f"ds.{item}.images", golden_arrays()["clip56_pad"][item : item + 1])
    if not pixels:  # the reference gives text-only rows a zero picture, ours have none
        assert not expected.any()
        return
    np.testing.assert_allclose(np.stack(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.goldens
def test_every_row_of_the_golden_file_is_read_and_its_modality_length_is_the_references():
    assert len(golden_records()) == len(golden_items())
    assert sources.modality_lengths(golden_records()) == golden_arrays()["ds.modality_lengths"].tolist()


def test_several_files_are_read_in_order_and_ids_name_file_and_row(tmp_path):
    text_only = {"conversations": GOOD["conversations"][1:]}
    first = write(tmp_path / "one.json", [GOOD, text_only])
    second = write(tmp_path / "two.json", [GOOD | {"image": ["a.png", "b.png"]}])
    found = sources.load_records(config(f"{first}, {second}", "pictures"), "train")
    assert [record.id for record in found] == ["one.json[0]", "one.json[1]", "two.json[0]"]
    assert [record.images for record in found] == [
        ("pictures/a.png",),
        (),
        ("pictures/a.png", "pictures/b.png"),
    ]
    assert found[0].answers == ("b",) and found[0].turns[0].role == "human"


def test_files_of_the_same_name_keep_different_ids(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.json", [GOOD])
    found = sources.load_records(config(f"{tmp_path}/x/rows.json,{tmp_path}/y/rows.json"), "train")
    assert len({record.id for record in found}) == 2


def test_held_out_rows_must_be_named_so_they_are_never_the_training_rows(tmp_path):
    write(tmp_path / "rows_val.json", [GOOD, GOOD])
    assert len(sources.load_records(config(f"{tmp_path}/rows_{{split}}.json"), "val")) == 2
    with pytest.raises(ValueError, match=r"split 'val' would be the training rows; name the files by split"):
        sources.load_records(config(f"{tmp_path}/rows_val.json"), "val")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r"the row is list; a row is an object"),
        ({"image": "a.png"}, r"conversations=None; it must be a list of turns"),
        (GOOD | {"conversations": []}, r"conversations=\[\]"),
        (GOOD | {"image": 3}, r"image=3; it must be a path or a list of paths"),
        (GOOD | {"image": [""]}, r"image=\[''\]"),
        (GOOD | {"video": "a.mp4"}, r"has a 'video'; only images are supported"),
        (GOOD | {"conversations": [{"from": "system", "value": "x"}]}, r"turn 0 .*'from': human or gpt"),
        (GOOD | {"conversations": [{"from": "human"}]}, r"turn 0 .*'value': text; mend it"),
        (GOOD | {"conversations": ["Hello"]}, r"turn 0 is 'Hello'"),
    ],
)
def test_a_row_of_an_unknown_shape_is_named(tmp_path, row, message):
    file = write(tmp_path / "rows.json", [GOOD, row])
    with pytest.raises(bad_samples.SampleError, match=rf"sample 'rows\.json\[1\]': .*{message}"):
        sources.load_records(config(file), "train")
    kept = sources.load_records(config(file, on_bad_sample="drop"), "train")
    assert [record.id for record in kept] == ["rows.json[0]"]


def test_a_file_that_is_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.json: the top level is dict; LLaVA's JSON is a list of rows"):
        sources.load_records(config(write(tmp_path / "rows.json", {"data": []})), "train")


def test_dropped_rows_are_counted(tmp_path):
    bad = bad_samples.BadSamples("drop")
    file = write(tmp_path / "rows.json", [GOOD, {}, {}])
    assert len(llava.load_records(str(file), "", "train", bad)) == 1
    assert bad.counts == {"malformed_row": 2}
