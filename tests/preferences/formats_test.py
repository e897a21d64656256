"""Formats of others: their published rows read, ours written, and both back again."""

import collections
import dataclasses
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from moe_vlm_jax.data import bad_samples, pairs, records
from moe_vlm_jax.preferences import formats, tables
from tests.preferences import examples

Turn = records.Turn
ASKED = (Turn("human", "<image>\nWhat?"),)
TEXT = {"type": "text", "text": "What?"}


def read(form, *sources, policy="error", image_folder=None):
    bad, ignored = bad_samples.BadSamples(policy), collections.Counter()
    found = list(formats.import_pairs([str(s) for s in sources], form, bad, image_folder=image_folder, ignored=ignored))
    return found, bad.counts, ignored


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, *rows):
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(examples.encoded())
    return path


def test_trl_rows_are_read_from_json_lines(tmp_path, picture):
    row = {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}],
    }
    implicit = {"images": ["a.png"], **{key: row["prompt"] + row[key] for key in ("chosen", "rejected")}}
    scored = row | {"id": "s", "score_chosen": 3.0}
    (one, two, three), _, ignored = read("trl", write_lines(tmp_path / "t.jsonl", row, implicit, scored))
    assert one == pairs.Pair("t.jsonl:1", (str(picture),), ASKED, "red", "blue", "TRL")
    assert two == dataclasses.replace(one, id="t.jsonl:2")
    assert three == dataclasses.replace(one, id="s")
    assert ignored == {"score_chosen": 1}


def test_trl_rows_are_read_from_parquet_as_the_hub_stores_them(tmp_path):
    # Items of one list have one type in parquet, so an image's item has a null text.
    row = {
        "images": [{"bytes": examples.encoded("JPEG"), "path": None}],
        "prompt": [{"role": "user", "content": [{"text": None, "type": "image"}, {"text": "What?", "type": "text"}]}],
        "chosen": [{"role": "assistant", "content": [{"text": "red", "type": "text"}]}],
        "rejected": [{"role": "assistant", "content": [{"text": "blue", "type": "text"}]}],
    }
    (one,), *_ = read("trl", write_parquet(tmp_path / "t.parquet", row))
    assert one == pairs.Pair("t.parquet[0]", (examples.encoded("JPEG"),), ASKED, "red", "blue", "TRL")


RLHF_V = {
    "ds_name": "RLHF-V",
    "text": json.dumps({"question": "What?", "chosen": "red", "rejected": "blue"}),
    "origin_dataset": "vcr",
    "origin_split": '{"model": "x", "type": "detailed"}',
    "idx": 7,
    "image_path": "a.png",
}
RLAIF_V = {key: value for key, value in RLHF_V.items() if key != "text"} | {
    "ds_name": "RLAIF-V",
    "question": "What?",
    "chosen": "red",
    "rejected": "blue",
}


@pytest.mark.parametrize(("form", "row"), [("rlhf-v", RLHF_V), ("rlaif-v", RLAIF_V)])
def test_rlhf_v_and_rlaif_v_are_read(tmp_path, picture, form, row):
    source = row["ds_name"]
    image = {"bytes": examples.encoded(), "path": "a.png"}
    (one,), _, ignored = read(form, write_parquet(tmp_path / "d.parquet", row | {"image": image}))
    assert one == pairs.Pair("d.parquet[0]", (examples.encoded(),), ASKED, "red", "blue", source)
    assert not ignored
    lines = [row, row | {"image": "a.png"}, row | {"image": {"bytes": None, "path": "a.png"}}]
    lines.append(row | {"image": {"bytes": None, "path": None}})
    found, *_ = read(form, write_lines(tmp_path / "d.jsonl", *lines))
    assert found == [dataclasses.replace(one, id=f"d.jsonl:{i}", images=(str(picture),)) for i in (1, 2, 3, 4)]


def test_the_files_of_a_folder_are_one_data_set(tmp_path):
    image = {"bytes": examples.encoded(), "path": ""}
    for name in ("b", "a"):
        write_parquet(tmp_path / f"{name}.parquet", RLAIF_V | {"image": image, "chosen": name})
    (tmp_path / "README.md").write_text("read me")
    found, *_ = read("rlaif-v", tmp_path)
    assert [(pair.id, pair.chosen) for pair in found] == [("a.parquet[0]", "a"), ("b.parquet[0]", "b")]


def test_llava_rows_are_read(tmp_path, picture):
    human = {"from": "human", "value": "<image>\nWhat?"}
    row = {
        "id": 5,
        "image": "a.png",
        "conversations": [human],
        "chosen": "red",
        "rejected": {"from": "gpt", "value": "blue"},
    }
    expected = pairs.Pair("5", (str(picture),), ASKED, "red", "blue", "LLaVA")
    assert read("llava", write_lines(tmp_path / "l.jsonl", row))[0] == [expected]
    (tmp_path / "l.json").write_text(json.dumps([row]))
    assert read("llava", tmp_path / "l.json", image_folder=str(tmp_path))[0] == [expected]
    text = {"conversations": [human | {"value": "Hi?"}], "chosen": "a", "rejected": "b"}
    assert read("llava", write_lines(tmp_path / "t.jsonl", text))[0][0].images == ()


BAD = [
    ("rlhf-v", RLHF_V | {"text": "{"}, "malformed_row", "is not JSON"),
    ("rlhf-v", RLHF_V | {"text": json.dumps({"question": "What?"})}, "malformed_row", "must be JSON with question"),
    ("rlhf-v", {k: v for k, v in RLHF_V.items() if k != "text"}, "malformed_row", "text=None"),
    ("rlhf-v", RLHF_V | {"image_path": "none.png"}, "missing_image", "'none.png'"),
    ("rlaif-v", RLAIF_V | {"rejected": "red"}, "equal_answers", "both 'red'"),
    ("rlaif-v", {k: v for k, v in RLAIF_V.items() if k != "question"}, "malformed_row", "no prompt or question"),
    ("trl", {"prompt": "A?", "chosen": "a"}, "malformed_row", "no 'rejected'"),
    ("llava", {"conversations": [], "chosen": "a", "rejected": "b"}, "malformed_row", "conversations=[]"),
    (
        "llava",
        {"conversations": [{"from": "user"}], "chosen": "a", "rejected": "b"},
        "malformed_row",
        "conversations[0]",
    ),
    (
        "llava",
        {"conversations": [{"from": "human", "value": "A?"}], "chosen": {"from": "gpt"}, "rejected": "b"},
        "malformed_row",
        "chosen is",
    ),
]


@pytest.mark.parametrize(("form", "row", "kind", "said"), BAD)
def test_rows_that_cannot_be_read_are_errors_or_counted(tmp_path, picture, form, row, kind, said):
    path = write_lines(tmp_path / "d.jsonl", row)
    with pytest.raises(bad_samples.SampleError, match=r"sample 'd\.jsonl:1'") as caught:
        read(form, path)
    assert caught.value.kind == kind
    assert said in str(caught.value)
    assert read(form, path, policy="drop")[:2] == ([], {kind: 1})


def test_broken_bytes_and_repeated_ids_are_counted(tmp_path):
    rows = [RLAIF_V | {"image": {"bytes": b, "path": ""}} for b in (b"no image", examples.encoded())]
    found, counts, _ = read("rlaif-v", write_parquet(tmp_path / "d.parquet", *rows), policy="drop")
    assert ([pair.id for pair in found], counts) == (["d.parquet[1]"], {"unreadable_image": 1})
    row = {"id": 1, "prompt": "A?", "chosen": "a", "rejected": "b"}
    found, counts, _ = read("trl", write_lines(tmp_path / "t.jsonl", row, row), policy="drop")
    assert (len(found), counts) == (1, {"repeated_id": 1})


def test_files_that_cannot_be_read_are_errors(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but cut off")
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "none").mkdir()
    for name, said in {
        "x.parquet": "not a whole parquet file",
        "x.csv": "is none of .jsonl, .json, .parquet",
        "x.json": "it must be a list of rows",
        "none": "has no .jsonl, .json, .parquet files",
        "absent.jsonl": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=said):
            read("trl", tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"x\.parquet is a parquet file, which needs pyarrow; install it"):
        read("trl", tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"needs pyarrow"):
        tables.write_parquet(tmp_path / "y.parquet", [{}])


def examples_of_pairs(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(examples.encoded(color=ord(name)))
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    turns = (Turn("human", "<image>\nA é?"), Turn("gpt", "b"), Turn("human", "<image>\nC?"))
    return [
        pairs.Pair("1", (a,), ASKED, "x", "y", "ana,ben", ("x", "z"), "image-span"),
        pairs.Pair("2", (a, b), turns, "x\n1", "y", "automatic"),
        pairs.Pair("3", (), (Turn("human", "D?"),), "x", "y", "automatic"),
    ]


@pytest.mark.parametrize("form", ["trl", "llava"])
def test_what_is_exported_comes_back_as_it_was(tmp_path, form):
    found = examples_of_pairs(tmp_path)
    bad = bad_samples.BadSamples("error")
    assert formats.WRITERS[form](tmp_path / "out" / "x.jsonl", iter(found), bad) == 3
    assert read(form, tmp_path / "out" / "x.jsonl") == (found, {}, {})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rlhf_v_comes_back_but_for_what_it_has_no_place_for(tmp_path, suffix):
    many = [dataclasses.replace(examples_of_pairs(tmp_path)[0], id=str(i), chosen=f"x{i}") for i in range(70)]
    bad = bad_samples.BadSamples("drop")
    path = tmp_path / f"x.{suffix}"
    assert formats.export_rlhf_v(path, [*examples_of_pairs(tmp_path)[1:], *many], bad) == 70
    assert bad.counts == {"not_exportable": 2}
    again, *_ = read("rlhf-v", path)
    image = (tmp_path / "a.png").read_bytes() if suffix == "parquet" else many[0].images[0]
    kept = [dataclasses.replace(pair, id="", images=(image,), answers=(), answer_type="") for pair in many]
    assert [dataclasses.replace(pair, id="") for pair in again] == kept
    assert len({pair.id for pair in again}) == 70
    with pytest.raises(bad_samples.SampleError, match="sample '2': it has 2 images, 3 turns"):
        formats.export_rlhf_v(path, examples_of_pairs(tmp_path), bad_samples.BadSamples("error"))


def test_the_exported_rows_are_those_of_the_formats(tmp_path):
    found, bad = examples_of_pairs(tmp_path)[:1], bad_samples.BadSamples("error")
    rows = {}
    for form, write in formats.WRITERS.items():
        write(tmp_path / f"{form}.jsonl", found, bad)
        rows[form] = json.loads((tmp_path / f"{form}.jsonl").read_text())
    notes = {"source": "ana,ben", "answers": ["x", "z"], "answer_type": "image-span"}
    assert rows["trl"] == {
        "id": "1",
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "y"}]}],
        **notes,
    }
    assert rows["llava"] == {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
        **notes,
    }
    assert json.loads(rows["rlhf-v"].pop("text")) == {"question": "What?", "chosen": "x", "rejected": "y"}
    assert rows["rlhf-v"] == {
        "ds_name": "ana,ben",
        "image": "a.png",
        "origin_dataset": "ana,ben",
        "origin_split": "",
        "idx": 0,
        "image_path": "a.png",
    }


def test_imported_images_are_files_beside_the_pairs(tmp_path):
    image = {"bytes": examples.encoded("WEBP"), "path": ""}
    source = write_parquet(tmp_path / "d.parquet", RLAIF_V | {"image": image})
    bad = bad_samples.BadSamples("error")
    rows = formats.import_pairs([str(source)], "rlaif-v", bad, image_folder=None, ignored=collections.Counter())
    pairs.write_pairs(tmp_path / "out" / "p.jsonl", rows)
    (pair,) = pairs.read_pairs(tmp_path / "out" / "p.jsonl", bad)
    (written,) = (tmp_path / "out" / "images").iterdir()
    assert pair.images == (str(written),)
    assert (written.suffix, written.read_bytes()) == (".webp", examples.encoded("WEBP"))


def test_a_parquet_file_is_read_a_part_at_a_time(tmp_path):
    size, groups = 100_000, 10
    path = tmp_path / "d.parquet"
    with parquet.ParquetWriter(path, pyarrow.schema([("image", pyarrow.binary())]), compression="none") as writer:
        for i in range(groups):
            writer.write_table(pyarrow.table({"image": [bytes([i, k]) * (size // 2) for k in range(64)]}))
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in tables.rows([str(path)])]
    assert len(held) == groups * 64
    assert max(held) < path.stat().st_size / 2
