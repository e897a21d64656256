"""Prompts of conversations, and how much of a cache they leave."""

import numpy as np
import pytest

from moe_vlm_jax.batch import IGNORE_INDEX
from moe_vlm_jax.data import bad_samples, records, tokenize
from moe_vlm_jax.serving import prompts
from tests.serving import examples

pytestmark = pytest.mark.goldens

TEXTS = ["<image>\nWhat colour?", "Red.", "Sure?", "Yes, it is.", "<image>\nAnd this?", "Blue."]
# 'single' templates are trained with another text than they ask with (see templates.speaker_lines).
MULTI_TURN = [
    *[(name, "gpt2") for name in ("phi", "qwen", "stablelm", "plain_qa", "chatml", "llama_3", "mpt")],
    *[(name, "llama") for name in ("v1", "vicuna_v1", "v1_mmtag", "llama_2", "llava_llama_2")],
]


def turns(count: int) -> tuple[prompts.Turn, ...]:
    return tuple(prompts.Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(TEXTS[:count]))


@pytest.mark.parametrize(("template", "name"), MULTI_TURN)
@pytest.mark.parametrize("system", [None, "Be rude."])
def test_every_turn_is_asked_with_what_training_writes_in_front_of_its_answer(template, name, system):
    made = examples.prompts_of(examples.config(template, answer_prompt=" Be short."), name)
    if template == "plain_qa" and system:
        with pytest.raises(ValueError, match="no place for a system text"):
            made.encode(turns(1), [examples.encoded()], system=system)
        return
    chosen = made._template if system is None else made._template.with_system(system)
    trained = tokenize.encode(
        records.Record("r", ("a", "b"), turns(6)),
        examples.tokenizer(name),
        chosen,
        max_text_tokens=10_000,
        answer_prompt=" Be short.",
    )
    learned = trained.labels != IGNORE_INDEX
    begins = np.flatnonzero(learned & ~np.r_[False, learned[:-1]])  # where an answer begins
    assert len(begins) == 3
    for round_, begin in enumerate(begins):
        images = [examples.encoded()] * (1 + (round_ == 2))
        asked = made.encode(turns(2 * round_ + 1), images, system=system)
        assert asked.tolist() == trained.tokens[:begin].tolist()


def test_faults_are_found_before_an_image_is_decoded(monkeypatch):
    made = examples.prompts_of()
    with pytest.raises(bad_samples.SampleError, match="does not exist"):
        made.encode([prompts.question_turn("?", 1)], ["/nowhere.png"])
    with pytest.raises(bad_samples.SampleError, match="2 <image> marks and it has 1 images"):
        made.encode([prompts.question_turn("?", 2)], [examples.encoded()])
    with pytest.raises(bad_samples.SampleError, match="must alternate"):
        made.encode([*turns(1), *turns(1)], [examples.encoded()] * 2)
    with pytest.raises(ValueError, match="the question is empty"):
        made.encode([prompts.question_turn(" ", 1)], [examples.encoded()])
    with pytest.raises(ValueError, match="earlier answer is empty"):
        made.encode([*turns(1), prompts.Turn("gpt", ""), prompts.Turn("human", "?")], [examples.encoded()])


def test_unknown_words_of_any_turn_are_named():
    made = examples.prompts_of(examples.config("plain_qa"), "closed")
    said = [
        prompts.Turn("human", "how many zebras ?"),
        prompts.Turn("gpt", "twelvety"),
        prompts.Turn("human", "zebras ?"),
    ]
    with pytest.raises(ValueError, match="does not know 'zebras', 'twelvety';"):
        made.encode(said, [])


def test_images_take_their_tokens_and_lengths_are_rounded_up():
    made = examples.prompts_of(examples.config("plain_qa"))
    tokens = made.encode([prompts.question_turn("What is it?", 2)], [examples.encoded()] * 2)
    per_image = examples.config().model.vision.num_tokens
    assert made.length(tokens) == len(tokens) + 2 * (per_image - 1)
    front = made.length(tokens[: np.flatnonzero(tokens < 0)[-1] + 1])
    assert made.slots(tokens) == -(-front // 8) * 8 + -(-(made.length(tokens) - front) // 8) * 8
    assert made.room(tokens, 100) == 100 - made.slots(tokens)
    assert made.room(tokens, 10_000) == 480 - made.length(tokens)  # the model's positions
