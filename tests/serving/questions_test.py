"""Files of questions: what is asked, in which order, what is wrong with which line, and going on."""

import json

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.serving import questions
from tests.serving import examples

pytestmark = pytest.mark.goldens

SETTINGS = {"model": "m", "seed": 0}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(examples.encoded(ord(name[0])))
    (tmp_path / "wide.png").write_bytes(examples.encoded(size=(200, 100)))
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def read(folder, *rows, check=lambda tokens: None):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "q.jsonl").write_text("\n".join(lines) + "\n")
    return questions.read(folder / "q.jsonl", examples.prompts_of(), check)


def row(index, *images: str, question: str = "What?") -> dict:
    return {"id": index, "images": list(images), "question": question}


def test_rows_keep_their_line_and_images_are_relative_to_the_file(folder):
    found, faults = read(
        folder, row("x", "a.png", "b.png"), "", {"id": 7, "image": str(folder / "a.png"), "question": "?"}
    )
    assert faults == []
    assert [(q.line, q.id) for q in found] == [(1, "x"), (3, 7)]
    assert found[0].images == (str(folder / "a.png"), str(folder / "b.png")) and found[0].named == ("a.png", "b.png")
    assert found[1].images == (str(folder / "a.png"),)
    assert [int((q.tokens < 0).sum()) for q in found] == [2, 1]


FAULTS = {
    "no JSON": ('{"id": ', "must be one JSON object"),
    "a list": ("[1]", "must be one JSON object"),
    "no id": ({"question": "?"}, "id=None"),
    "id of another type": ({"id": [1], "question": "?"}, r"id=[1]"),
    "truth as id": ({"id": True, "question": "?"}, "id=True"),
    "no question": ({"id": 1}, "question=None"),
    "empty question": ({"id": 1, "question": " "}, "question is empty"),
    "unknown key": ({"id": 1, "question": "?", "answer": "x"}, "unknown keys ['answer']"),
    "two keys of images": (
        {"id": 1, "question": "?", "image": "a.png", "images": ["a.png"]},
        "both 'image' and 'images'",
    ),
    "missing image": (row(1, "c.png"), "'c.png' does not exist"),
    "image of another type": ({"id": 1, "image": 3, "question": "?"}, "image 3 is neither"),
    "no image": (row(1, "text.png"), "cannot be decoded"),
    "large image": (row(1, "wide.png"), "has 200 x 100 = 20000 pixels"),
    "mark": (row(1, "a.png", question="<image> ?"), "2 <image> marks and it has 1 images"),
    "same id": (row("first"), "id 'first' stands in line 1 already"),
    "too long": (row(1, question="long " * 100), "too long for this test"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_bad_row_is_named_by_its_line_and_the_others_are_asked(folder, case):
    bad, message = FAULTS[case]

    def check(tokens: np.ndarray) -> None:
        if len(tokens) > 200:
            raise ValueError("too long for this test")

    found, faults = read(folder, row("first", "a.png"), bad, row("last", "b.png"), check=check)
    assert [q.id for q in found] == ["first", "last"]
    (fault,) = faults
    assert fault.startswith("q.jsonl:2: ") and message in fault, fault


def ask(found, engine, stop=(), num_waiting=3):
    generation = config_lib.GenerationConfig(max_new_tokens=60, stop=stop)
    return list(questions.ask(found, engine, examples.prompts_of(), generation, num_waiting=num_waiting))


def test_questions_about_the_same_images_stand_together_and_share_their_pixels(folder):
    names = [("a.png",), ("b.png",), ("a.png", "b.png"), ()]
    found, _ = read(folder, *(row(i, *names[i % 4]) for i in range(12)))
    engine = examples.saying("yes", num_rows=2)
    answers = ask(found, engine)
    assert sorted((question.id, *rest) for question, *rest in answers) == [(i, "yes", "stop") for i in range(12)]
    asked = [tuple(id(image) for image in request.prompt.images) for request in engine.asked]
    assert asked == [image for i in range(4) for image in [asked[3 * i]] * 3]
    assert asked[6] == (asked[0][0], asked[3][0])
    assert [request.row_id for request in engine.asked] == [q.line for q in questions.together(found)]


def test_only_few_wait_with_their_images_in_memory(folder):
    found, _ = read(folder, *(row(i, "a.png") for i in range(40)))
    engine = examples.saying("yes", num_rows=2)
    waiting = []
    submit = engine.submit
    engine.submit = lambda request: (submit(request), waiting.append(engine.num_waiting))[0]
    assert len(ask(found, engine, num_waiting=3)) == 40
    assert max(waiting) == 3


def test_stop_strings_free_the_row(folder):
    found, _ = read(folder, *(row(i) for i in range(5)))
    engine = examples.saying("one two three four", num_rows=2, steps=1)
    assert [(text, finish) for _, text, finish in ask(found, engine, stop=("three",))] == [("one two", "stop")] * 5
    assert len(engine.cancelled) == 5


def test_answers_are_on_the_disk_one_by_one_and_the_file_goes_on(folder):
    found, _ = read(folder, row(1, "a.png"), row("two"))
    out = folder / "out.jsonl"
    with questions.Answers(out, found, SETTINGS) as answers:
        assert answers.done == set()
        answers.add(found[0], "日本", "stop")
        (line,) = out.read_text().splitlines()
        assert json.loads(line) == {
            **row(1, "a.png"),
            "answer": "日本",
            "finish": "stop",
            "settings": SETTINGS,
        }
    out.write_text(out.read_text() + '{"id": "two", "ans')  # killed in the middle of a line
    with questions.Answers(out, found, SETTINGS) as answers:
        assert answers.done == {1}
        answers.add(found[1], "", "length")
    with questions.Answers(out, found, SETTINGS) as answers:
        assert answers.done == {1, "two"}
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 9}, "answers 9, which is not asked"),
        ({"id": "1"}, "answers '1', which is not asked"),
        ({"id": None}, "answers None"),
        ({"question": "Other?"}, "answers 1, which is not asked"),
        ({"images": []}, "answers 1, which is not asked"),
        ({"settings": {"model": "m", "seed": 1}}, "was answered with {'model': 'm', 'seed': 1}, not with"),
    ],
)
def test_a_file_of_other_answers_is_left_alone(folder, change, message):
    found, _ = read(folder, row(1, "a.png"))
    out = folder / "out.jsonl"
    line = json.dumps({**row(1, "a.png"), "answer": "x", "finish": "stop", "settings": SETTINGS, **change}) + "\n"
    out.write_text(line)
    with pytest.raises(ValueError, match=r"out\.jsonl:1") as raised:
        questions.Answers(out, found, SETTINGS)
    assert message in str(raised.value)
    assert out.read_text() == line
    out.write_text("[]\n")
    with pytest.raises(bad_samples.SampleError):
        questions.Answers(out, found, SETTINGS)


def test_settings_say_all_that_answers_depend_on():
    made = questions.settings_of("runs/x", config_lib.GenerationConfig(stop=("a",), temperature=0.5))
    assert made["model"] == "runs/x" and made["stop"] == ["a"] and made["temperature"] == 0.5
    assert json.loads(json.dumps(made)) == made
