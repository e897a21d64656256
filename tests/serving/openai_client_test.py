"""OpenAI's own Python client, unmodified, against the server."""

import asyncio

import openai
import pytest

from tests.serving import examples

pytestmark = pytest.mark.goldens

ANSWER = "A red square, 日本!"
QUESTION = [
    {"role": "system", "content": "Be short."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": examples.data_url()}},
            {"type": "image_url", "image_url": {"url": examples.data_url(examples.encoded(9)), "detail": "high"}},
        ],
    },
]


@pytest.fixture
def server():
    started = examples.Server(examples.saying(ANSWER), num_slots=2)
    yield started
    started.engine.hold.clear()
    started.stop()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_an_answer_about_images(client, server):
    said = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0.7, top_p=0.9, seed=4, max_tokens=30, stop=["\n\n"], n=1,
        extra_body={"top_k": 20, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert said.choices[0].message.content == ANSWER
    assert said.choices[0].finish_reason == "stop"
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens > 8
    (request,) = server.engine.asked
    assert len(request.prompt.images) == 2
    generation = request.generation
    assert (generation.temperature, generation.top_k, generation.seed, generation.stop) == (0.7, 20, 4, ("\n\n",))


def test_a_stream_about_images(client):
    options = {"include_usage": True}
    with client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 1
    assert len(chunks) > 4


def test_several_turns(client, server):
    turns = list(QUESTION)
    for text in ("And now?", "Sure?"):
        said = client.chat.completions.create(model="tiny", messages=turns).choices[0].message
        turns += [{"role": said.role, "content": said.content}, {"role": "user", "content": text}]
    client.chat.completions.create(model="tiny", messages=turns)
    text = examples.tokenizer().decode([t for t in server.engine.asked[-1].prompt.tokens if t >= 0])
    assert text.count(ANSWER) == 2 and text.endswith("USER: Sure? ASSISTANT:")


def test_an_answers_message_may_be_sent_back_as_it_came(client):
    first = client.chat.completions.create(model="tiny", messages=QUESTION).choices[0].message
    turns = [*QUESTION, first, {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(model="tiny", messages=turns).choices[0].message.content == ANSWER


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moe_vlm_jax"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"n": 2}, openai.BadRequestError),
        ({"logprobs": True}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": ""}]}, openai.BadRequestError),
    ],
)
def test_errors_are_those_of_the_client(client, fields, error):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, **fields})
    assert raised.value.body["message"] and raised.value.type == "invalid_request_error"


def test_a_full_queue_is_a_rate_limit_and_the_client_tries_again_by_itself(client, server):
    server.engine.hold.set()
    address = f"http://127.0.0.1:{server.port}/v1"

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=5) as many:
            waiting = [
                asyncio.create_task(many.chat.completions.create(model="tiny", messages=QUESTION)) for _ in range(2)
            ]
            await asyncio.to_thread(server.wait_for, lambda: len(server.engine.asked) == 2)
            with pytest.raises(openai.RateLimitError):
                await asyncio.to_thread(client.chat.completions.create, model="tiny", messages=QUESTION)
            late = asyncio.create_task(many.chat.completions.create(model="tiny", messages=QUESTION))
            await asyncio.sleep(0.3)
            server.engine.hold.clear()
            return [(await task).choices[0].message.content for task in (*waiting, late)]

    assert asyncio.run(ask()) == [ANSWER] * 3


def test_closing_a_stream_gives_the_row_back(client, server):
    server.engine.hold.set()
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()
    server.wait_for(lambda: server.engine.cancelled == [101])


def test_a_server_that_stops_in_the_middle_of_a_stream_is_an_error(client, server):
    server.engine.hold.set()
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
    server.interruptions.count = 2
    with pytest.raises(openai.APIError, match="the server stops"):
        list(stream)
