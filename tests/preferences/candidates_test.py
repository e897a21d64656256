"""Candidates: a growing file that a kill does not break, and every fault of a row."""

import json

import pytest

from moe_vlm_jax.data import bad_samples, records
from moe_vlm_jax.preferences import candidates
from tests.preferences import examples


def read(path, policy="error"):
    return candidates.read_candidates(path, bad_samples.BadSamples(policy))


def write(path, *found):
    with candidates.CandidateWriter(path) as writer:
        for candidate in found:
            writer.append(candidate)


def test_candidates_come_back_as_they_were(tmp_path):
    (tmp_path / "a.png").write_bytes(examples.encoded())
    turns = (records.Turn("human", "Hi?"), records.Turn("gpt", "Yes?"), records.Turn("human", "<image>\nHow?"))
    first = candidates.Candidate(
        "1", (str(tmp_path / "a.png"),), turns, ("a", ""), ("a", "b"), "image-span", {"seed": 3, "temperature": 0.7}
    )
    second = examples.candidate("2", answers=())
    path = tmp_path / "c.jsonl"
    write(path, first)
    write(path, second)
    assert read(path) == [first, second]
    row = json.loads(path.read_text().split("\n")[1])
    assert row == {
        "id": "2",
        "images": [],
        "prompt": "What is 2?",
        "responses": ["red", "It is red."],
        "answers": [],
        "answer_type": "",
        "sampling": {},
    }


def test_images_in_memory_are_written_beside_the_file(tmp_path):
    path = tmp_path / "new" / "c.jsonl"
    write(path, *(examples.candidate(str(i), images=(examples.encoded("JPEG"),)) for i in range(2)))
    (image,) = (tmp_path / "new" / "images").iterdir()
    assert image.read_bytes() == examples.encoded("JPEG")
    assert [candidate.images for candidate in read(path)] == [(str(image),)] * 2


def test_a_killed_writers_half_line_is_left_out_by_readers_and_removed_by_the_next_writer(tmp_path, caplog):
    path = tmp_path / "c.jsonl"
    one, two, three = (examples.candidate(name) for name in "abc")
    write(path, one, two)
    whole = path.read_bytes()
    for cut in (1, 5, 60):
        path.write_bytes(whole[:-cut])
        caplog.clear()
        found = read(path)
        if cut == 1:  # only the line's end is missing
            assert found == [one, two]
        else:
            assert found == [one]
            assert "half-written last line" in caplog.text
        write(path, three)
        assert read(path) == [*found, three]


FAULTS = [
    ({"responses": ["red", " red"]}, "equal_answers", "only different ones"),
    ({"responses": ["red"]}, "malformed_row", "1 responses"),
    ({"responses": "red"}, "malformed_row", "responses='red'"),
    ({"responses": None}, "malformed_row", "no ['responses']"),
    ({"prompt": None}, "malformed_row", "no ['prompt']"),
    ({"prompt": "<image>\nWhat?"}, "image_marks", "1 <image> marks and 0 images"),
    ({"images": ["none.png"]}, "missing_image", "'none.png' does not exist"),
    ({"sampling": 3}, "malformed_row", "sampling=3"),
    ({"answer_type": 3}, "malformed_row", "answer_type=3"),
    ({"response": "red"}, "unknown_keys", "['response']"),
]


@pytest.mark.parametrize(("change", "kind", "said"), FAULTS)
def test_a_fault_stops_or_is_counted(tmp_path, change, kind, said):
    good = {"id": "q7", "prompt": "What?", "responses": ["red", "blue"]}
    row = {key: value for key, value in (good | change).items() if value is not None}
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(good | {"id": "q8"}) + "\n" + json.dumps(good | {"id": "q8"}))
    with pytest.raises(bad_samples.SampleError, match="sample 'q7'") as caught:
        read(path)
    assert caught.value.kind == kind
    assert said in str(caught.value)
    bad = bad_samples.BadSamples("drop")
    assert [candidate.id for candidate in candidates.read_candidates(path, bad)] == ["q8"]
    assert bad.counts == {kind: 1, "repeated_id": 1}


def test_the_digest_is_of_what_was_compared():
    one = examples.candidate("a")
    assert one.digest() == examples.candidate("a", answers=("blue",)).digest()
    others = [
        examples.candidate("b"),
        examples.candidate("a", second="It is Red."),
        examples.candidate("a", "It is red.", "red"),
    ]
    assert len({candidate.digest() for candidate in (one, *others)}) == 4
    assert len(one.digest()) == 12
