"""Asking in chunks: order, draws, bad samples, and what a killed call leaves."""

import dataclasses
import json

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, tokenize
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import asking, runner
from moe_vlm_jax.evaluation.benchmarks import benchmark
from tests.evaluation.benchmarks import official

MODEL = config_lib.ModelConfig(
    vision=config_lib.VisionConfig(image_size=16, patch_size=8),
    decoder=config_lib.DecoderConfig(max_positions=40),
)
DATA = config_lib.DataConfig()
TRANSFORM = images_lib.transform_for(MODEL.vision, DATA)
CLOSED = tokenize.load_tokenizer("closed")
PROMPT = "how many items are shown ?"


def question(name: str, image: str, unit: str = "", prompt: str = PROMPT) -> benchmark.Question:
    return benchmark.Question(
        id=name, images=(image,) if image else (), prompt=prompt, asked=prompt, answers=("4",), unit=unit
    )


@pytest.fixture
def images(tmp_path) -> list[str]:
    return [str(official.write(tmp_path / f"{i}.jpg", official.picture(i))) for i in range(4)]


def prepare(questions, policy: str = "error", **values) -> asking.Prepared:
    bad = bad_samples.BadSamples(policy, "on_bad_sample")
    settings = {"max_new_tokens": 3, "max_questions": 0, "bad": bad} | values
    return asking.prepare("set", questions, model=MODEL, data=DATA, tokenizer=CLOSED, transform=TRANSFORM, **settings)


@pytest.fixture
def model(monkeypatch):
    """Stands for the model: says its prompt's number of tokens; keeps what it was asked; dies when told to."""
    asked: list[list[tuple]] = []

    def answer(graphdef, params, config, images, prompts, tokenizer, transform):
        if len(asked) == model_.dies_after:
            raise KeyboardInterrupt
        asked.append(list(images))
        said = [f"{len(prompt)} {config.generation.max_new_tokens}" for prompt in prompts]
        return [(text, len(image) == 1) for text, image in zip(said, images, strict=True)]

    class Model:
        calls, dies_after = asked, -1

    model_ = Model()
    monkeypatch.setattr(runner, "answer_prompts", answer)
    return model_


def ask(prepared, folder, chunk=3) -> None:
    config = config_lib.RunConfig(model=MODEL, data=DATA)
    asking.ask(None, None, config, prepared, CLOSED, folder, chunk=chunk)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_questions_of_one_image_are_asked_in_one_chunk(images, tmp_path, model):
    order = [0, 1, 2, 0, 1, 3, 2, 0]
    made = prepare([question(str(i), images[n]) for i, n in enumerate(order)])
    ask(made, tmp_path / "out", chunk=2)
    assert [len(call) for call in model.calls] == [3, 2, 2, 1]
    assert all(len(set(call)) == 1 for call in model.calls)
    assert [row["id"] for row in rows(tmp_path / "out")] == ["0", "3", "7", "1", "4", "2", "6", "5"]


def test_one_image_with_very_many_questions_is_split(images, tmp_path, model):
    ask(prepare([question(str(i), images[0]) for i in range(9)]), tmp_path / "out", chunk=2)
    assert [len(call) for call in model.calls] == [4, 4, 1]


def test_a_row_holds_the_question_and_the_answer(images, tmp_path, model):
    ask(prepare([question("0", images[0]), question("1", "")]), tmp_path)
    first, second = rows(tmp_path)
    assert first == {
        "id": "0",
        "question": PROMPT,
        "asked": PROMPT,
        "images": ["0.jpg"],
        "answers": ["4"],
        "prediction": first["prediction"],
        "truncated": False,
        "group": {},
        "unit": "0",
    }
    assert first["prediction"].endswith(" 3")
    assert (second["truncated"], second["images"]) == (True, [])


def test_a_killed_call_goes_on_with_what_has_no_answer(images, tmp_path, model):
    made = prepare([question(str(i), images[i % 4]) for i in range(8)])
    model.dies_after = 2
    with pytest.raises(KeyboardInterrupt):
        ask(made, tmp_path / "out", chunk=2)
    before = rows(tmp_path / "out")
    assert len(before) == 4
    with (tmp_path / "out" / "predictions.jsonl").open("a") as file:
        file.write('{"id": "2", "pre')
    model.dies_after = -1
    ask(made, tmp_path / "out", chunk=2)
    after = rows(tmp_path / "out")
    assert after[:4] == before
    assert sorted(row["id"] for row in after) == [str(i) for i in range(8)]
    assert len(model.calls) == 4
    ask(made, tmp_path / "out")
    assert len(model.calls) == 4  # nothing was left


def test_images_that_are_bytes_are_written_once_beside_the_rows(tmp_path, model):
    ref = official.picture(1)
    made = [dataclasses.replace(question(str(i), "x"), images=(ref,)) for i in range(2)]
    ask(prepare(made), tmp_path)
    first, second = rows(tmp_path)
    assert first["images"] == second["images"]
    assert (tmp_path / first["images"][0]).read_bytes() == ref


def test_a_draw_takes_whole_units_and_is_that_of_training_where_there_are_none(images):
    single = [question(str(i), images[0]) for i in range(300)]
    kept = [
        records_lib.Record(id=q.id, images=q.images, turns=(records_lib.Turn("human", "?"),), answers=("4",))
        for q in single
    ]
    trained = runner.select_questions(kept, limit=50, seed=0)
    assert [q.id for q in asking.draw(single, 50)] == [record.id for record in trained]
    pairs = [question(str(i), images[0], unit=str(i // 2)) for i in range(40)]
    drawn = asking.draw(pairs, 10)
    assert len(drawn) == 10
    assert len({q.unit for q in drawn}) == 5
    assert asking.draw(pairs, 0) == asking.draw(pairs, 99) == pairs
    assert len(prepare(pairs, max_questions=10).questions) == 10
    assert prepare(pairs, max_questions=10).of == 40


MISTAKES = {
    "twice": (lambda images: [question("a", images[0])] * 2, r"set: 1 ids occur more than once \(first: 'a'\)"),
    "gone": (lambda images: [question("a", "/nowhere.jpg")], r"'a': image file '/nowhere.jpg' does not exist; set"),
    "word": (lambda images: [question("a", images[0], prompt="how many zebras ?")], "does not know 'zebras'"),
    "long": (lambda images: [question("a", images[0], prompt=PROMPT * 9)], r"max_positions=40; lower --config\.set"),
    "nothing": (lambda images: [], "the files have no question"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_question_that_cannot_be_asked_is_named(case, images):
    make, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        prepare(make(images))


def test_bad_samples_can_be_left_out_with_the_rest_of_their_unit(images):
    made = [
        question("a-0", images[0], unit="a"),
        question("a-1", "/nowhere.jpg", unit="a"),
        question("b-0", images[1], unit="b"),
    ]
    kept = prepare(made, "drop")
    assert [q.id for q in kept.questions] == ["b-0"]
    assert kept.skipped == {"missing_image": 1, "rest_of_its_unit": 1}
    with pytest.raises(ValueError, match="on_bad_sample='drop' leaves such samples out"):
        prepare(made)


def test_the_digest_tells_when_anything_that_is_asked_changes(images):
    base = question("a", images[0])
    digest = prepare([base]).digest()
    assert prepare([base]).digest() == digest
    changed = [
        prepare([dataclasses.replace(base, id="b")]),
        prepare([dataclasses.replace(base, prompt="how many items ?")]),
        prepare([dataclasses.replace(base, answers=("5",))]),
        prepare([dataclasses.replace(base, images=(images[1],))]),
        prepare([base], max_new_tokens=4),
        dataclasses.replace(prepare([base]), transform=dataclasses.replace(TRANSFORM, aspect="square")),
    ]
    assert len({digest, *(made.digest() for made in changed)}) == 7
    moved = dataclasses.replace(base, images=(images[0].replace("0.jpg", "./0.jpg"),))
    assert prepare([moved]).digest() == digest  # the same files elsewhere are the same questions


def test_the_encoded_prompt_is_the_templates_with_the_images_mark(images):
    made = prepare([question("a", images[0])])
    record = records_lib.Record(id="a", images=(images[0],), turns=(records_lib.Turn("human", f"<image>\n{PROMPT}"),))
    np.testing.assert_array_equal(made.prompts[0], tokenize.encode_prompt(record, CLOSED, DATA.template))
