"""Pairs: every form of a row, every fault of one, and files that come back as they were."""

import io
import json

import pytest
from PIL import Image

from moe_vlm_jax.data import bad_samples, pairs, records, tokenize

Turn = records.Turn
GOOD = {"id": "q7", "images": ["a.png"], "prompt": "<image>\nWhat?", "chosen": "red", "rejected": "It is red."}
PLAIN = (Turn("human", "<image>\nWhat?"),)


def encoded(kind="PNG", color=0):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (color, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def message(role, *content):
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


QUESTION = message("user", {"type": "image"}, {"type": "text", "text": "What?"})


@pytest.fixture
def read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").write_bytes(encoded())

    def read(*rows, policy="error"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
        bad = bad_samples.BadSamples(policy)
        found = pairs.read_pairs(tmp_path / "p.jsonl", bad)
        return (found, bad) if policy == "drop" else found

    return read


def test_a_row_becomes_a_pair(read, tmp_path):
    (pair,) = read(GOOD | {"source": "automatic", "answers": ["red", "scarlet"], "answer_type": "image-span"})
    assert pair == pairs.Pair(
        id="q7",
        images=(str(tmp_path / "a.png"),),
        turns=PLAIN,
        chosen="red",
        rejected="It is red.",
        source="automatic",
        answers=("red", "scarlet"),
        answer_type="image-span",
    )


def test_a_pair_gives_records_that_can_be_encoded():
    pair = pairs.Pair("q7", ("a.png",), PLAIN, "red", "It is red.", "ana", ("red",), "image-span")
    chosen, rejected, other = (pair.record(answer) for answer in ("red", "It is red.", "blue"))
    assert [r.id for r in (chosen, rejected, other)] == ["q7:chosen", "q7:rejected", "q7:answer"]
    assert chosen.turns == (*PLAIN, Turn("gpt", "red"))
    assert (chosen.images, chosen.answers, chosen.answer_type) == (("a.png",), ("red",), "image-span")
    tokenizer = tokenize.load_tokenizer("closed")
    simple = pairs.Pair("q", ("a.png",), (Turn("human", "<image>\nwhat is largest ?"),), "red", "blue", "ana")
    for answer in ("red", "blue"):
        example = tokenize.encode(simple.record(answer), tokenizer, "plain_qa", max_text_tokens=64)
        learned = [token for token in example.labels if token >= 0]
        assert tokenizer.decode(learned, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "What?"},
        {"prompt": [QUESTION]},
        {"prompt": [message("user", "What?")]},
        {"prompt": None, "question": "What?"},
        {"images": None, "image": "a.png"},
        {"images": "a.png"},
        {
            "chosen": [message("assistant", {"type": "text", "text": "red"})],
            "rejected": [message("assistant", "It is red.")],
        },
        {"chosen": [QUESTION, message("assistant", "red")], "rejected": [QUESTION, message("assistant", "It is red.")]},
        {
            "prompt": None,
            "chosen": [QUESTION, message("assistant", "red")],
            "rejected": [QUESTION, message("assistant", "It is red.")],
        },
        {"prompt": [QUESTION], "chosen": [QUESTION, message("assistant", "red")]},
    ],
)
def test_other_spellings_mean_the_same(read, changes):
    row = {key: value for key, value in (GOOD | changes).items() if value is not None}
    if (
        "prompt" in row
        and isinstance(row["prompt"], str)
        and isinstance(row["chosen"], list)
        and len(row["chosen"]) > 1
    ):
        row["prompt"] = "<image>\nWhat?"
    assert read(row) == read(GOOD)


def test_a_conversation_and_a_row_without_id_source_or_images(read):
    prompt = [message("user", "Hi?"), message("assistant", "Yes?"), message("user", "How?")]
    (pair,) = read({"prompt": prompt, "chosen": "So.", "rejected": "No."})
    assert pair.turns == (Turn("human", "Hi?"), Turn("gpt", "Yes?"), Turn("human", "How?"))
    assert (pair.id, pair.source, pair.images, pair.answers) == ("p.jsonl:1", "p", (), ())


def test_images_without_marks_stand_in_front_of_the_first_question(read):
    prompt = [message("user", "Hi?"), message("assistant", "Yes?"), message("user", "How?")]
    (pair,) = read(GOOD | {"images": ["a.png", "b.png"], "prompt": prompt})
    assert [turn.text for turn in pair.turns] == ["<image>\n<image>\nHi?", "Yes?", "How?"]


FAULTS = [
    (GOOD | {"rejected": "red "}, "equal_answers", "both 'red'"),
    (GOOD | {"rejected": " \n"}, "empty_answer", r"rejected=' \n'"),
    (GOOD | {"chosen": ""}, "empty_answer", "chosen=''"),
    (GOOD | {"chosen": "<image> red"}, "image_marks", "remove it"),
    (GOOD | {"images": ["c.png"]}, "missing_image", "'c.png' does not exist"),
    (GOOD | {"images": ["../p"]}, "missing_image", "'../p' does not exist"),
    (GOOD | {"images": []}, "image_marks", "1 <image> marks and 0 images"),
    (GOOD | {"images": ["a.png", "b.png"]}, "image_marks", "1 <image> marks and 2 images"),
    (GOOD | {"images": [7]}, "malformed_row", "image 7 is neither"),
    (GOOD | {"image": "a.png"}, "malformed_row", "both 'images' and 'image'"),
    (GOOD | {"question": "What?"}, "malformed_row", "both 'prompt' and 'question'"),
    (GOOD | {"answer": "red"}, "unknown_keys", "['answer'] are unknown"),
    (GOOD | {"answers": "red"}, "malformed_row", "answers='red'"),
    (GOOD | {"source": 3}, "malformed_row", "source=3"),
    (GOOD | {"id": 1.5}, "malformed_row", "id=1.5"),
    (GOOD | {"prompt": " ", "images": []}, "turns", "the question is empty"),
    (GOOD | {"prompt": [QUESTION, message("assistant", "Yes?")]}, "turns", "['human', 'gpt']"),
    (GOOD | {"prompt": [QUESTION, message("user", "And?")]}, "turns", "['human', 'human']"),
    (GOOD | {"chosen": [message("user", "red")]}, "malformed_row", "must end with the answer"),
    ({"id": "q7", "prompt": "What?", "chosen": "red"}, "malformed_row", "no 'rejected'"),
    ({"id": "q7", "chosen": "red", "rejected": "blue"}, "malformed_row", "no prompt or question"),
    (
        {"id": "q7", "chosen": [message("user", "A?"), message("assistant", "a")], "rejected": "b"},
        "different_prompts",
        "'A?'",
    ),
    (
        {
            "id": "q7",
            "chosen": [message("user", "A?"), message("assistant", "a")],
            "rejected": [message("user", "B?"), message("assistant", "b")],
        },
        "different_prompts",
        "'A?', 'B?' was asked",
    ),
    (
        {"id": "q7", "prompt": "C?", "chosen": [message("user", "A?"), message("assistant", "a")], "rejected": "b"},
        "different_prompts",
        "'A?', 'C?' was asked",
    ),
    (
        {"id": "q7", "prompt": "C?"}
        | {key: [message("user", "A?"), message("assistant", key)] for key in ("chosen", "rejected")},
        "different_prompts",
        "'A?', 'C?' was asked",
    ),
]


@pytest.mark.parametrize(("row", "kind", "said"), FAULTS, ids=[f"{kind}-{i}" for i, (_, kind, _) in enumerate(FAULTS)])
def test_a_fault_stops_the_run_or_is_counted(read, row, kind, said):
    with pytest.raises(bad_samples.SampleError) as caught:
        read(row)
    assert (caught.value.sample_id, caught.value.kind) == (str(row["id"]) if row["id"] != 1.5 else "p.jsonl:1", kind)
    assert said in str(caught.value)
    found, bad = read(row, GOOD | {"id": "other"}, policy="drop")
    assert [pair.id for pair in found] == ["other"]
    assert bad.counts == {kind: 1}


def test_broken_lines_and_repeated_ids_are_faults_too(read):
    found, bad = read(GOOD, '{"id": ', "[]", GOOD | {"chosen": "blue"}, GOOD | {"id": 8}, policy="drop")
    assert [pair.id for pair in found] == ["q7", "8"]
    assert found[0].chosen == "red"
    assert bad.counts == {"bad_json": 2, "repeated_id": 1}
    assert "'p.jsonl:2': Expecting value, column 8" in bad.first["bad_json"]


def test_a_cut_off_file_is_an_error_since_files_of_pairs_are_written_whole(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "A?", "chosen": "a", "rejected": "b"}\n{"prompt": "B')
    with pytest.raises(bad_samples.SampleError, match="ends in its middle"):
        pairs.read_pairs(tmp_path / "p.jsonl", bad_samples.BadSamples("error"))


def test_files_come_back_as_they_were(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").write_bytes(encoded())
    turns = (Turn("human", "<image>\nA <image> é?"), Turn("gpt", "b\u2028"), Turn("human", "C?"))
    inside, outside = str(tmp_path / "in" / "a.png"), str(tmp_path / "b.png")
    found = [
        pairs.Pair("1", (inside, outside), turns, "x", "y\n", "ana,ben", ("x", ""), "image-span"),
        pairs.Pair("2", (), (Turn("human", "D?"),), "x", "y", "automatic"),
        pairs.Pair("3", (encoded("JPEG"),), PLAIN, "x", "y", "RLAIF-V"),
        pairs.Pair("4", (encoded("JPEG"),), PLAIN, "x", "z", "RLAIF-V"),
    ]
    path = tmp_path / "in" / "p.jsonl"
    assert pairs.write_pairs(path, iter(found)) == 4
    images = [json.loads(line)["images"] for line in path.read_text(encoding="utf-8").rstrip().split("\n")]
    assert images[0] == ["a.png", outside]
    assert images[2] == images[3]
    assert images[2][0].startswith("images/")
    assert images[2][0].endswith(".jpg")
    (written,) = (tmp_path / "in" / "images").iterdir()
    assert written.read_bytes() == encoded("JPEG")
    again = pairs.read_pairs(path, bad_samples.BadSamples("error"))
    assert again[:2] == found[:2]
    assert [pair.images for pair in again[2:]] == [(str(written),)] * 2
    pairs.write_pairs(tmp_path / "moved.jsonl", again)
    assert pairs.read_pairs(tmp_path / "moved.jsonl", bad_samples.BadSamples("error")) == again


def test_nothing_is_written_for_pairs_that_could_not_be_read_again(tmp_path):
    pair = pairs.Pair("1", (), (Turn("human", "D?"),), "x", "y", "ana")
    with pytest.raises(ValueError, match="its id occurs twice"):
        pairs.write_pairs(tmp_path / "p.jsonl", [pair, pair])
    with pytest.raises(ValueError, match="sample '2': its image"):
        pairs.write_pairs(tmp_path / "p.jsonl", [pairs.Pair("2", (b"no image",), PLAIN, "x", "y", "ana")])
    assert not (tmp_path / "p.jsonl").exists()
