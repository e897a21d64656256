"""Many clients, a full queue, clients that go away, and the server's own end."""

import json
import re
import socket
import threading

import pytest

from tests.serving import examples

pytestmark = pytest.mark.goldens

ANSWER = examples.ANSWER
question = examples.question


def begin(server: examples.Server, body: dict):
    """Sends a request and returns its connection; nobody reads the answer yet."""
    connection = server.connection()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), examples.JSON)
    return connection


def test_many_at_once_share_the_rows_and_each_gets_its_own_answer(serve):
    ids = examples.tokenizer()

    def echo(request):
        text = ids.decode([t for t in request.prompt.tokens if t >= 0])
        return ids(re.search(r"number (\d+)", text)[1] * 5).input_ids

    server = serve(examples.Engine(echo, num_rows=3), num_slots=40)
    answers = {}

    def ask(i: int) -> None:
        answers[i] = server.ask(question(f"number {i}", examples.encoded(i), max_tokens=50))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: said["choices"][0]["message"]["content"] for i, (_, said) in answers.items()} == {
        i: str(i) * 5 for i in range(40)
    }
    assert server.service.num_busy == 0


def test_a_full_queue_is_said_at_once_and_later_there_is_room_again(serve):
    server = serve(num_slots=3)
    server.engine.hold.set()
    waiting = [begin(server, question()) for _ in range(3)]
    server.wait_for(lambda: len(server.engine.asked) == 3)
    status, headers, said = server.send("POST", "/v1/chat/completions", json.dumps(question()), **examples.JSON)
    error = json.loads(said)["error"]
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(headers["Retry-After"]) >= 1
    assert server.send("GET", "/health")[0] == 200
    server.engine.hold.clear()
    assert [connection.getresponse().status for connection in waiting] == [200] * 3
    server.wait_for(lambda: server.service.num_busy == 0)
    assert server.ask(question())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_goes_away_gives_its_row_and_its_place_back(serve, stream, waits):
    server = serve(examples.saying(ANSWER * 50, num_rows=1), num_slots=2, cache_length=4000)
    server.engine.hold.set()
    first = begin(server, question(stream=stream))
    server.wait_for(lambda: len(server.engine.asked) == 1)
    leaves = first
    if waits:  # behind another one in the queue
        leaves = begin(server, question(stream=stream))
        server.wait_for(lambda: len(server.engine.asked) == 2)
    elif stream:
        assert first.getresponse().read(20)  # in the middle of its answer
    leaves.sock.shutdown(socket.SHUT_RDWR) if leaves.sock else None
    leaves.close()
    server.wait_for(lambda: server.engine.cancelled == [102 if waits else 101])
    server.wait_for(lambda: server.service.num_busy == waits)
    server.engine.hold.clear()
    assert server.ask(question())[1]["choices"][0]["finish_reason"] == "length"
    first.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_takes_no_place(serve):
    server = serve(num_slots=1)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        server.wait_for(lambda: server.service.num_busy == 1)
    server.wait_for(lambda: server.service.num_busy == 0)
    assert server.ask(question())[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("moe_vlm_jax.serving.service._CLIENT_SECONDS", 0.2)
    server = serve(num_slots=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    server.wait_for(lambda: server.service.num_busy == 0)


def test_bytes_that_are_no_http_do_no_harm(shared):
    for data in (
        b"\0\1\2\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n",
        b"A" * 100_000,
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as connection:
            connection.sendall(data)
    assert shared.ask(question())[0] == 200


def test_a_stop_lets_what_runs_end_and_refuses_what_is_new(serve):
    server = serve()
    server.engine.hold.set()
    running = begin(server, question())
    server.wait_for(lambda: len(server.engine.asked) == 1)
    open_ = server.connection()
    open_.request("GET", "/health")
    open_.getresponse().read()
    server.interruptions.add()
    server.wait_for(lambda: server.service.stopping)
    open_.request("POST", "/v1/chat/completions", json.dumps(question()), examples.JSON)
    refused = open_.getresponse()
    assert (refused.status, json.loads(refused.read())["error"]["type"]) == (503, "server_error")
    server.engine.hold.clear()
    answer = running.getresponse()
    assert json.loads(answer.read())["choices"][0]["message"]["content"] == ANSWER
    server.thread.join(10)
    assert not server.thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        server.ask(question())


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_grace_an_answer_is_cut_off_with_an_error(serve, stream):
    server = serve(grace=0.1)
    server.engine.hold.set()
    running = begin(server, question(stream=stream))
    server.wait_for(lambda: len(server.engine.asked) == 1)
    server.interruptions.add()
    answer = running.getresponse()
    said = answer.read()
    assert answer.status == (200 if stream else 503)
    error = json.loads(examples.events(said)[-1] if stream else said)["error"]
    assert error["message"] == "the answer was not finished: the server stops."
    server.thread.join(10)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_breaks_fails_what_runs_and_ends_the_server_with_a_fault(serve, stream):
    server = serve()
    server.engine.hold.set()
    running = begin(server, question(stream=stream))
    server.wait_for(lambda: len(server.engine.asked) == 1)
    server.engine.breaks = True
    answer = running.getresponse()
    said = answer.read()
    assert answer.status == (200 if stream else 500)
    error = json.loads(examples.events(said)[-1] if stream else said)["error"]
    assert (error["type"], error["message"]) == ("server_error", "the answer was not finished: decoding failed.")
    server.thread.join(10)
    assert not server.thread.is_alive() and server.service.failed
