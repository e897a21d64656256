"""One function over all sources."""

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import records, sources


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"data\.source='coco' is not one of \('embedded', "):
        sources.load_records(config_lib.DataConfig(source="coco"), "train")


def test_a_source_without_rows_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"'llava' has no rows in split 'train'; check data\.path"):
        sources.load_records(config_lib.DataConfig(source="llava", path=str(tmp_path / "rows.json")), "train")


def test_the_embedded_set_comes_through_the_same_function(tmp_path):
    data = config_lib.DataConfig(source="embedded", difficulty="mini", num_images=3, cache=str(tmp_path))
    found = sources.load_records(data, "train")
    assert len({record.images for record in found}) == 3
    assert all(record.answers and record.turns[0].text.startswith("<image>") for record in found)


def test_only_the_answer_types_that_are_asked_for_are_kept(tmp_path):
    data = config_lib.DataConfig(num_images=6, cache=str(tmp_path))
    every = sources.load_records(data, "train")
    data.answer_types = ("caption", "question-span")
    found = sources.load_records(data, "train")
    assert found == [record for record in every if record.answer_type in ("caption", "question-span")]
    assert 6 < len(found) < len(every)
    held_out = sources.load_records(data, "val")  # without captions, which are no reason to refuse it
    assert {record.answer_type for record in held_out} == {"question-span"}
    data.answer_types = ("captions",)
    with pytest.raises(ValueError, match=r"answer_types names 'captions', but split 'train' .* has 'caption', 'image-"):
        sources.load_records(data, "train")


def test_modality_lengths_count_words_and_are_negative_for_text_only():
    turns = (records.Turn("human", "<image>\nwhat is it?"), records.Turn("gpt", "a dog"))
    found = [records.Record("a", ("a.png",), turns), records.Record("b", (), turns[1:])]
    assert sources.modality_lengths(found) == [6, -2]
