"""200 requests at once against a real model: each gets the answer that it gets alone, offline."""

import asyncio
import base64
import dataclasses
import io
import json

import aiohttp
import numpy as np
import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import generate, ready
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.serving import engines, prompts, requests
from tests.serving import examples, tiny_model

NUM_REQUESTS = 200
WORDS = ("how", "many", "items", "are", "shown", "which", "item", "is", "largest", "smallest", "what", "the", "?")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, its images as encoded files, and how many tokens it may get."""

    text: str
    images: tuple[bytes, ...]
    new_tokens: int


def questions(source: ready.Source) -> list[Asked]:
    generator = np.random.default_rng(0)
    known = [word for word in WORDS if source.tokenizer.unk_token_id not in source.tokenizer(word).input_ids]
    assert len(known) > 6
    pictures = []
    for _ in range(6):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return [
        Asked(
            " ".join(generator.choice(known, generator.integers(1, 8))),
            tuple(pictures[i] for i in generator.integers(0, 6, generator.integers(0, 3))),
            int(generator.choice([3, 9])),
        )
        for _ in range(NUM_REQUESTS)
    ]


def offline(source: ready.Source, asked: list[Asked]) -> list[tuple[str, bool]]:
    """Returns what evaluation says to each question: whole batches, no engine."""
    made = prompts.Prompts(source.config, source.tokenizer, source.transform)
    graphdef, params = source.load()
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    answers: dict[int, tuple[str, bool]] = {}
    for new_tokens in (3, 9):
        chosen = [i for i, each in enumerate(asked) if each.new_tokens == new_tokens]
        generation = config_lib.GenerationConfig(max_new_tokens=new_tokens)
        evaluation = dataclasses.replace(source.config.evaluation, batch_size=16)
        config = dataclasses.replace(source.config, generation=generation, evaluation=evaluation)
        tokens = [
            made.encode([prompts.question_turn(asked[i].text, len(asked[i].images))], asked[i].images) for i in chosen
        ]
        images = [asked[i].images for i in chosen]
        found = runner.answer_prompts(graphdef, params, config, images, tokens, source.tokenizer, source.transform)
        answers.update(zip(chosen, found, strict=True))
    return [answers[i] for i in range(len(asked))]


async def ask_all(port: int, asked: list[Asked]) -> list[tuple[int, str, str]]:
    """Returns (status, text, finish) of every question, all sent at once, every second one streamed."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:

        async def ask(i: int) -> tuple[int, str, str]:
            body = {**examples.question(asked[i].text, *asked[i].images), "max_tokens": asked[i].new_tokens}
            body |= {"stream": bool(i % 2), "temperature": 0}
            async with session.post("/v1/chat/completions", json=body) as answer:
                said = await answer.read()
                if answer.status != 200 or not body["stream"]:
                    choice = json.loads(said).get("choices", [{"message": {"content": said}, "finish_reason": ""}])[0]
                    return answer.status, choice["message"]["content"], choice["finish_reason"]
                data = [line.removeprefix("data: ") for line in said.decode().split("\n\n")]
                assert data[-2:] == ["[DONE]", ""]
                choices = [json.loads(event)["choices"][0] for event in data[:-2]]
                text = "".join(choice["delta"].get("content", "") for choice in choices)
                return answer.status, text, choices[-1]["finish_reason"]

        return await asyncio.gather(*(ask(i) for i in range(len(asked))))


@pytest.mark.slow
def test_200_requests_at_once_get_the_answers_that_they_get_offline(tmp_path, monkeypatch, capsys):
    source = tiny_model.source()
    asked = questions(source)
    expected = [(200, text, "stop" if stopped else "length") for text, stopped in offline(source, asked)]
    assert len({text for _, text, _ in expected}) > 50  # the model says something, and not always the same
    engine = engines.start(source, num_rows=8, cache_length=64, steps_per_call=4)
    server = examples.Server(
        engine,
        limits=requests.Limits(body_bytes=100_000, images=2, new_tokens=9),
        num_slots=NUM_REQUESTS,
        cache_length=64,
        prompts_=prompts.Prompts(source.config, source.tokenizer, source.transform),
    )
    try:
        assert asyncio.run(ask_all(server.port, asked)) == expected
        assert asyncio.run(ask_all(server.port, asked[:9])) == expected[:9]
        assert engine.computed_tokens < 0.9 * engine.prompt_tokens  # six pictures, alone and in pairs, again and again
        pictured = next(each for each in asked if each.images)
        for _ in range(2):
            _, said = server.ask({**examples.question(pictured.text, *pictured.images), "max_tokens": 3})
        kept = said["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert source.config.model.vision.num_tokens * len(pictured.images) <= kept < said["usage"]["prompt_tokens"]
    finally:
        server.stop()
    # The command `generate` says the same.
    monkeypatch.setattr(ready, "from_workdir", lambda workdir: source)
    rows = []
    for i, each in enumerate(asked):
        if each.new_tokens == 9:
            names = [f"{base64.b32encode(image[-24:]).decode()}.png" for image in each.images]
            for name, image in zip(names, each.images, strict=True):
                (tmp_path / name).write_bytes(image)
            rows.append({"id": i, "images": names, "question": each.text})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl")]
    assert generate.main(["--workdir", "run", *files, "--max-new-tokens", "9"]) == 0, capsys.readouterr().err
    lines = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert {row["id"]: (200, row["answer"], row["finish"]) for row in lines} == {
        r["id"]: expected[r["id"]] for r in rows
    }
