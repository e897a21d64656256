"""Prompts: byte for byte the reference's, and for ChatML and Llama 3 what their published templates give."""

import json

import jinja2
import pytest

from moe_vlm_jax.data import records, templates
from tests.conftest import goldens_folder

ASKED = [records.Turn("human", "<image>\nWhat is this?")]
ANSWERED = [
    records.Turn("human", "Q1"),
    records.Turn("gpt", "A1"),
    records.Turn("human", "Q2"),
    records.Turn("gpt", "A2"),
]
# As published with Qwen2 and Llama 3.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def golden_prompts():
    return json.loads((goldens_folder() / "preprocess" / "preprocess.json").read_text())["prompts"]


@pytest.mark.goldens
@pytest.mark.parametrize("name", golden_prompts())
def test_prompts_are_byte_for_byte_the_references(name):
    expected = golden_prompts()[name]
    template = templates.choose(name)
    assert templates.render(template, ASKED) == expected["inference_prompt"]
    if expected["training_prompt"] is not None:
        assert templates.render(template, ANSWERED) == expected["training_prompt"]


@pytest.mark.parametrize(("name", "published", "closing"), [("chatml", QWEN2, "\n"), ("llama_3", LLAMA_3, "")])
def test_chat_prompts_are_what_the_published_template_gives(name, published, closing):
    template = templates.choose(name)
    rendered = jinja2.Template(published, keep_trailing_newline=True)

    def expected(turns):
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
        return rendered.render(messages=messages, add_generation_prompt=turns[-1].role == "human")

    # The line break behind the last answer is not learned, so it is not written.
    assert templates.render(template, ANSWERED) + closing == expected(ANSWERED)
    assert templates.render(template, ANSWERED[:3]) == expected(ANSWERED[:3])


def test_segments_learn_the_answer_and_its_end_and_nothing_else():
    pieces = templates.segments(templates.choose("chatml"), ANSWERED)
    assert [text for text, trained in pieces if trained] == ["A1<|im_end|>", "A2<|im_end|>"]
    assert pieces[2] == ("\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n", False)


def test_plain_qa_ends_answers_with_the_tokenizers_own_end_token():
    template = templates.choose("plain_qa").with_eos("</s>")
    turns = [records.Turn("human", "<image>largest ?"), records.Turn("gpt", "japan")]
    assert templates.render(template, turns) == "<image>largest ? japan</s>"
    assert templates.render(template, turns[:1]) == "<image>largest ?"
    with pytest.raises(ValueError, match=r"plain_qa.*has none; set eos_token"):
        templates.choose("plain_qa").with_eos(None)


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"data\.template='fi' is not a known template; use one of .*phi"):
        templates.choose("fi")
