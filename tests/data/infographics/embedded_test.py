"""The cached rendering of the embedded set."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, infographicvqa
from moe_vlm_jax.data.infographics import embedded, mini, vocabulary


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> config_lib.DataConfig:
    return config_lib.DataConfig(cache=str(tmp_path_factory.mktemp("cache")), num_images=30)


@pytest.fixture(autouse=True)
def few_held_out_images(monkeypatch):
    monkeypatch.setattr(embedded, "DEFAULT_IMAGES", {"mini": {"train": 40, "val": 20, "test": 21}})


def folders(data):
    """Returns what lies in the cache, but for the empty files by which processes wait for each other."""
    found = pathlib.Path(data.cache).iterdir()
    return sorted(path.name for path in found if path.suffix != ".lock" or path.stat().st_size)


def test_the_infographicvqa_loader_reads_the_same_questions_from_the_folder(cache):
    for split, count in (("train", 30), ("val", 20), ("test", 21)):
        ours = embedded.load_records(cache, split)
        theirs = infographicvqa.load_records(
            str(embedded.ensure_rendered(cache, split)), split, bad_samples.BadSamples("error")
        )
        assert len(ours) == len(theirs) == count * (10 + (split == "train"))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.images, a.turns, a.answers, a.answer_type) == (b.images, b.turns, b.answers, b.answer_type)
        assert len({record.images for record in ours}) == count


def test_rows_have_the_fields_of_the_official_question_files(cache):
    folder = embedded.ensure_rendered(cache, "val")
    content = json.loads((folder / "infographicsVQA_val_v1.0_withQT.json").read_text())
    assert content["dataset_name"] == "synthetic infographics" and content["dataset_split"] == "val"
    official = {"questionId", "question", "image_local_name", "answers", "data_split", "answer_type", "evidence"}
    official |= {"operation/reasoning"}
    for row in content["data"]:
        assert official <= set(row)
        assert isinstance(row["questionId"], int) and row["data_split"] == "val"
        assert all(isinstance(row[key], list) for key in ("answers", "answer_type", "evidence", "operation/reasoning"))
        with Image.open(folder / "images" / row["image_local_name"]) as image:
            assert image.size == (64, 64) and image.mode == "RGB"


def test_captions_are_for_training_only(cache):
    types = {split: [r.answer_type for r in embedded.load_records(cache, split)] for split in ("train", "val", "test")}
    assert types["train"].count("caption") == 30
    assert "caption" not in types["val"] + types["test"]


def test_no_image_is_in_two_splits(cache):
    pixels = {}
    for split in ("train", "val", "test"):
        names = {record.images[0] for record in embedded.load_records(cache, split)}
        pixels[split] = {np.asarray(Image.open(name)).tobytes() for name in names}
        assert len(pixels[split]) == len(names)
    assert not pixels["train"] & (pixels["val"] | pixels["test"])
    assert not pixels["val"] & pixels["test"]


def test_val_and_test_share_no_chart_even_when_they_draw_the_same_ones(tmp_path, monkeypatch):
    make = np.random.default_rng
    monkeypatch.setattr(embedded.np.random, "default_rng", lambda seed: make(7))
    drawn = {"val": [], "test": []}
    for split, charts in drawn.items():
        monkeypatch.setattr(mini, "draw", lambda chart, charts=charts: charts.append(chart) or Image.new("RGB", (1, 1)))
        embedded.ensure_rendered(config_lib.DataConfig(cache=str(tmp_path)), split)
    assert not set(drawn["val"]) & set(drawn["test"])


def test_a_rendered_set_is_read_again_not_rendered_again(cache, monkeypatch):
    first = embedded.load_records(cache, "val")
    monkeypatch.setattr(mini, "draw", None)
    assert embedded.load_records(cache, "val") == first


def test_two_caches_hold_the_same_bytes(cache, tmp_path):
    other = config_lib.DataConfig(cache=str(tmp_path / "other"), num_images=30)
    here, there = (embedded.ensure_rendered(data, "train") for data in (cache, other))
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in files)


def test_an_interrupted_render_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    data = config_lib.DataConfig(cache=str(tmp_path), num_images=12)
    drawn = []
    draw = mini.draw

    def interrupted(chart):
        drawn.append(chart)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(chart)

    monkeypatch.setattr(mini, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure_rendered(data, "train")
    assert folders(data) == []
    assert len(embedded.load_records(data, "train")) == 12 * 11


def test_what_a_killed_render_left_behind_is_not_taken_for_a_set(tmp_path):
    data = config_lib.DataConfig(cache=str(tmp_path), num_images=12)
    name = embedded.ensure_rendered(data, "train").name
    rest = tmp_path / f".{name}-abc"
    (tmp_path / name).rename(rest)
    (rest / "images" / "0.png").unlink()
    assert len(list((embedded.ensure_rendered(data, "train") / "images").iterdir())) == 12


def test_the_number_of_images_belongs_to_the_name_and_leaves_the_held_out_splits_alone(tmp_path):
    for count in (3, 4):
        data = config_lib.DataConfig(cache=str(tmp_path), num_images=count)
        assert len({r.images for r in embedded.load_records(data, "train")}) == count
        assert len({r.images for r in embedded.load_records(data, "val")}) == 20
    assert len(folders(data)) == 3


def test_without_a_configured_cache_the_users_cache_folder_is_used(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert embedded.cache_folder("") == pathlib.Path("/somewhere/moe_vlm_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder("") == pathlib.Path.home() / ".cache" / "moe_vlm_jax"


@pytest.mark.parametrize(
    "settings, split, message",
    [({"difficulty": "huge"}, "val", "difficulty='huge'.*mini or full"), ({}, "dev", "no split 'dev'.*train")],
)
def test_an_unknown_difficulty_or_split_is_an_error(tmp_path, monkeypatch, settings, split, message):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=message):
        embedded.load_records(config_lib.DataConfig(cache=str(tmp_path), **settings), split)


def test_a_share_of_the_answers_to_train_on_are_sentences(tmp_path):
    plain = config_lib.DataConfig(cache=str(tmp_path), num_images=30)
    wordy = config_lib.DataConfig(cache=str(tmp_path), num_images=30, wordy_share=0.5)
    before, after = (embedded.load_records(data, "train") for data in (plain, wordy))
    assert after == embedded.load_records(wordy, "train")
    known = set(vocabulary.words())
    changed = 0
    for one, other in zip(before, after, strict=True):
        assert (one.id, one.answers, one.turns[:-1]) == (other.id, other.answers, other.turns[:-1])
        short, long = one.turns[-1].text, other.turns[-1].text
        assert long == short or (long.startswith("the ") and long.endswith(f" {short}"))
        assert set(long.replace(",", " ,").split()) <= known
        changed += long != short
        assert long == short or one.answer_type != "caption"
    asked = sum(record.answer_type != "caption" for record in before)
    assert 0.4 < changed / asked < 0.6
