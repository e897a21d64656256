"""Messages of TRL and chat APIs <-> turns with marks."""

import pytest

from moe_vlm_jax.data import bad_samples, messages, records

Turn = records.Turn
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([IMAGE, text("What?")], "<image>\nWhat?"),
        ([text("What?"), IMAGE], "What?\n<image>"),
        ([IMAGE, IMAGE, text("Which?")], "<image>\n<image>\nWhich?"),
        ([text("Is "), text("it?")], "Is it?"),
        ([text("A"), IMAGE, text("B"), text("C")], "A\n<image>\nBC"),
        ([IMAGE], "<image>"),
        (
            [{"type": "image", "text": None}, {"type": "text", "text": "What?", "url": None}],
            "<image>\nWhat?",
        ),  # parquet
    ],
)
def test_items_become_a_text_with_marks(items, expected):
    assert messages.to_turns([user(*items)], "r", "prompt") == (Turn("human", expected),)


def test_messages_may_be_texts_of_json():
    value = ['{"role": "user", "content": "A?"}', {"role": "assistant", "content": "b"}]
    assert messages.to_turns(value, "r", "prompt") == (Turn("human", "A?"), Turn("gpt", "b"))


@pytest.mark.parametrize(
    "turns",
    [
        (Turn("human", "What?"),),
        (Turn("human", "<image>\n<image>\nCompare."), Turn("gpt", "No."), Turn("human", "A\n\n<image>\n\nB")),
        (Turn("human", "<image>"),),
    ],
)
def test_turns_come_back_from_items_and_from_texts(turns):
    assert messages.to_turns(messages.to_items(turns), "r", "prompt") == turns
    assert messages.to_turns(messages.from_turns(turns), "r", "prompt") == turns


def test_the_items_are_those_of_trl():
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A dog."))
    assert messages.to_items(turns) == [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("A dog.")]},
    ]


def test_marks_are_removed_with_their_line_ends():
    assert messages.without_marks("<image>\n<image>\nWhich?") == "Which?"
    assert messages.without_marks("Which?\n<image>") == "Which?"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "prompt=3"),
        ([], "prompt=[]"),
        (["What?"], "a message is an object"),
        ([{"role": "system", "content": "Be brief."}], "the system text is the template's"),
        ([{"role": "user"}], "needs 'role'"),
        ([{"role": "user", "content": "a", "weight": 1}], "nothing else"),
        ([{"role": "user", "content": 7}], "prompt[0].content=7"),
        ([user({"type": "image", "image": "a.png"})], "image files stand in the row's 'images'"),
        ([user({"type": "video"})], "'video'"),
        ([user("What?")], "'What?'"),
    ],
)
def test_other_forms_are_refused(value, said):
    with pytest.raises(bad_samples.SampleError, match="sample 'r'") as caught:
        messages.to_turns(value, "r", "prompt")
    assert said in str(caught.value)
    assert caught.value.kind == "malformed_row"
