"""The conversation in the terminal: turns, images, commands, and that a failed message changes nothing."""

import io

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.serving import terminal
from tests.serving import examples

pytestmark = pytest.mark.goldens


class Talk:
    """A conversation whose lines a test gives."""

    def __init__(self, engine: examples.Engine, cache_length: int = 400, **fields):
        self.engine, self.out, self.notes = engine, io.StringIO(), io.StringIO()
        generation = config_lib.GenerationConfig(**{"max_new_tokens": 100, **fields})
        self.chat = terminal.Chat(
            lambda: engine,
            examples.prompts_of(),
            generation,
            cache_length=cache_length,
            out=self.out,
            notes=self.notes,
        )

    def say(self, *lines: str) -> tuple[int, str, str]:
        """Returns (failed lines, answers, notes) of these lines."""
        for stream in (self.out, self.notes):
            stream.seek(0)
            stream.truncate()
        failed = self.chat.run(f"{line}\n" for line in lines)
        return failed, self.out.getvalue(), self.notes.getvalue()

    def asked(self, index: int = -1) -> str:
        return examples.tokenizer().decode([t for t in self.engine.asked[index].prompt.tokens if t >= 0])


@pytest.fixture
def images(tmp_path):
    for name in ("a b.png", "c.png"):
        (tmp_path / name).write_bytes(examples.encoded())
    return tmp_path


def test_turns_and_images_are_remembered_and_forgotten(images):
    talk = Talk(examples.saying("A dog."))
    failed, out, notes = talk.say(f"/image {images}/a b.png", f"/image {images}/c.png", "What is it?", "Sure?")
    assert (failed, out) == (0, "A dog.\nA dog.\n")
    assert "(image 1 of the next message" in notes and "(image 2 of the next message" in notes
    assert "What is it? ASSISTANT: A dog.<|endoftext|>USER: Sure? ASSISTANT:" in talk.asked()
    assert [len(request.prompt.images) for request in talk.engine.asked] == [2, 2]
    _, out, _ = talk.say("/reset", "Who?")
    assert "dog" not in talk.asked() and talk.engine.asked[-1].prompt.images == ()


def test_an_answer_is_written_as_it_comes():
    talk = Talk(examples.saying("one two three four", steps=1))
    pieces = []
    write = talk.out.write
    talk.out.write = lambda text: (pieces.append(text), write(text))[1]
    talk.say("Count!")
    assert "".join(pieces) == "one two three four\n" and len([piece for piece in pieces if piece]) > 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image /nowhere.png", "does not exist"),
        ("/image", "needs the path"),
        ("/imag x", "'/imag' is no command; /image PATH"),
        ("what is <image> ?", "1 <image> marks and it has 0 images"),
        ("long " * 300, "of 400 that fit; begin a new one with /reset"),
    ],
)
def test_a_line_that_fails_is_counted_and_the_conversation_is_as_before(line, message):
    talk = Talk(examples.saying("Yes."))
    talk.say("First?")
    failed, out, notes = talk.say(line, "Second?")
    assert (failed, out) == (1, "Yes.\n")
    assert "error: " in notes and message in notes
    assert talk.asked().endswith("First? ASSISTANT: Yes.<|endoftext|>USER: Second? ASSISTANT:")


def test_an_image_waits_until_a_message_went_well(images):
    talk = Talk(examples.saying("Yes."))
    failed, _, _ = talk.say(f"/image {images}/c.png", "what is <image> ?", "What?")
    assert failed == 1 and len(talk.engine.asked[0].prompt.images) == 1


def test_an_empty_answer_is_no_turn():
    talk = Talk(examples.Engine(lambda request: []))
    failed, out, notes = talk.say("Hi?")
    assert (failed, out) == (0, "\n") and "said nothing" in notes
    assert talk.chat.turns == []


def test_an_answer_is_cut_where_the_conversation_is_full_or_at_the_limit():
    talk = Talk(examples.saying("word " * 400), cache_length=400)
    talk.chat._generation = config_lib.GenerationConfig(max_new_tokens=4)
    _, _, notes = talk.say("Hi?")
    assert "(cut off after 4 tokens)" in notes
    talk.chat._generation = config_lib.GenerationConfig(max_new_tokens=4000)
    talk.say("Hi?")
    request = talk.engine.asked[-1]
    slots = examples.prompts_of().slots(request.prompt.tokens)
    assert request.generation.max_new_tokens == min(400 - slots, 480 - len(request.prompt.tokens))


def test_ctrl_c_stops_an_answer_and_frees_its_row():
    talk = Talk(examples.saying("one two three four", steps=1))
    write = talk.out.write

    def interrupted(text: str) -> int:
        if "two" in talk.out.getvalue():
            raise KeyboardInterrupt
        return write(text)

    talk.out.write = interrupted
    failed, out, notes = talk.say("Count!")
    assert failed == 0 and out.startswith("one two") and "four" not in out
    assert "stopped" in notes and talk.engine.cancelled == [101] and talk.chat.turns == []


def test_quitting_ends_and_empty_lines_do_nothing():
    talk = Talk(examples.saying("Yes."))
    failed, out, notes = talk.say("", "   ", "/help", "Hi?", "/quit", "Never?")
    assert (failed, out, len(talk.engine.asked)) == (0, "Yes.\n", 1)
    assert terminal.HELP in notes
