"""The thread that owns the engine: what is told to whom, and that nothing is forgotten at an end."""

import queue

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import prompts
from moe_vlm_jax.serving import worker
from tests.serving import examples

pytestmark = pytest.mark.goldens


def request(**fields) -> engine_lib.Request:
    prompt = prompts.Prompt(examples.prompts_of().encode([examples.prompts.Turn("human", "?")], []))
    return engine_lib.Request(
        prompt=prompt, generation=config_lib.GenerationConfig(**{"max_new_tokens": 500, **fields})
    )


@pytest.fixture
def start():
    started = []

    def start(engine):
        started.append(worker.Worker(lambda: engine, examples.tokenizer()))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def ask(working: worker.Worker, **fields) -> tuple[worker.Ticket, queue.Queue]:
    arrived: queue.Queue[worker.Delta] = queue.Queue()
    return working.submit(request(**fields), arrived.put), arrived


def rest(arrived: queue.Queue) -> list[worker.Delta]:
    """Returns the deltas up to the last one."""
    found = [arrived.get(timeout=10)]
    while not found[-1].finish and not found[-1].error:
        found.append(arrived.get(timeout=10))
    return found


def test_an_answer_comes_in_pieces_behind_the_word_that_it_was_taken(start):
    text = " It is a red square, 日本! "
    _, arrived = ask(start(examples.saying(text)))
    first, *deltas = rest(arrived)
    assert first == worker.Delta()
    assert "".join(delta.text for delta in deltas) == text.strip()
    counts = [delta.num_tokens for delta in deltas]
    assert counts == sorted(counts) and counts[-1] == len(examples.tokenizer()(text).input_ids)
    assert deltas[-1].finish == "stop" and len(deltas) > 3


def test_a_stop_string_frees_the_row_and_a_limit_says_length(start):
    engine = examples.saying("one two three four", steps=1)
    working = start(engine)
    deltas = rest(ask(working, stop=("three",))[1])
    assert ("".join(delta.text for delta in deltas), deltas[-1].finish) == ("one two", "stop")
    assert engine.cancelled == [101]
    deltas = rest(ask(working, max_new_tokens=2)[1])
    assert (deltas[-1].finish, deltas[-1].num_tokens) == ("length", 2)
    assert rest(ask(working)[1])[-1].finish == "stop"
    assert engine.cancelled == [101]


def test_a_stop_string_at_the_very_end_is_not_cancelled(start):
    engine = examples.saying("one two", steps=50)
    deltas = rest(ask(start(engine), stop=("two",))[1])
    assert ("".join(delta.text for delta in deltas), deltas[-1].finish) == ("one", "stop")
    assert engine.cancelled == []


def test_a_refusal_is_told_and_nothing_else_suffers(start):
    working = start(examples.saying("yes"))
    (delta,) = rest(ask(working, temperature=1.0, top_k=7)[1])
    assert isinstance(delta.error, ValueError) and "refused by this engine" in str(delta.error)
    assert rest(ask(working)[1])[-1].finish == "stop"


def test_a_cancelled_request_hears_no_more_and_its_row_is_free(start):
    engine = examples.saying("yes " * 50)
    engine.hold.set()
    working = start(engine)
    ticket, arrived = ask(working)
    assert arrived.get(timeout=10) == worker.Delta()
    working.cancel(ticket)
    working.cancel(ticket)
    second = ask(working)[1]
    engine.hold.clear()
    assert rest(second)[-1].finish == "stop"
    assert engine.cancelled == [101] and arrived.empty()
    working.cancel(ticket)
    assert rest(ask(working)[1])[-1].finish == "stop"


def test_a_request_that_is_cancelled_before_the_engine_saw_it_never_gets_there(start):
    engine = examples.saying("yes")
    engine.hold.set()
    working = start(engine)
    ask(working)[1].get(timeout=10)
    ticket = worker.Ticket(
        request(), lambda delta: None, examples.service.worker_lib.text_lib.AnswerStream(examples.tokenizer())
    )
    ticket.cancelled = True
    working._commands.put((ticket, True))
    engine.hold.clear()
    assert rest(ask(working)[1])[-1].finish == "stop"
    assert len(engine.asked) == 2


@pytest.mark.parametrize("breaks", [False, True])
def test_an_end_is_told_to_everybody_also_to_those_who_come_later(start, breaks):
    engine = examples.saying("yes")
    engine.hold.set()
    working = start(engine)
    waiting = [ask(working)[1] for _ in range(6)]
    for arrived in waiting:
        assert arrived.get(timeout=10) == worker.Delta()
    if breaks:
        engine.breaks = True
        working._thread.join(10)
    else:
        working.stop()
    why = "decoding failed" if breaks else "the server stops"
    for arrived in (*waiting, ask(working)[1]):
        (delta,) = rest(arrived)
        assert isinstance(delta.error, worker.UnavailableError) and str(delta.error) == why
    assert working.ended and (working.failure is not None) is breaks


def test_an_engine_that_cannot_be_made_is_a_failure():
    def make():
        raise MemoryError("no room for the weights")

    working = worker.Worker(make, examples.tokenizer())
    working._thread.join(10)
    assert working.ended and isinstance(working.failure, MemoryError)
    assert str(rest(ask(working)[1])[0].error) == "decoding failed"
