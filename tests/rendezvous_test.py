"""The roll call over loopback, with threads in the place of processes."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterable

import pytest

from moe_vlm_jax import rendezvous


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def roll_call(port: int, callers: Iterable[tuple[int, int]], *, timeout: float = 10.0) -> list[str]:
    """Returns what each caller (process_id, num_processes) was told, all at the same time; '' for nothing wrong."""
    callers = list(callers)
    told = ["never came back"] * len(callers)

    def call(place: int, process_id: int, num_processes: int) -> None:
        try:
            rendezvous.roll_call(
                f"127.0.0.1:{port}", num_processes=num_processes, process_id=process_id, timeout=timeout
            )
            told[place] = ""
        except ValueError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=call, args=(i, *caller)) for i, caller in enumerate(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 10)
    return told


def say(port: int, line: bytes) -> None:
    """Sends a line to whoever listens, once somebody does, and waits for the connection to end."""
    connection = None
    while connection is None:
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        time.sleep(0.01)
    with connection, contextlib.suppress(ConnectionResetError):
        connection.sendall(line)
        assert connection.recv(1) == b""


def test_all_return_when_everyone_has_come_and_leave_the_port_free():
    port = free_port()
    assert roll_call(port, [(i, 4) for i in (2, 0, 3, 1)]) == [""] * 4
    with rendezvous._listen(f"127.0.0.1:{port}", port):
        pass  # JAX's coordinator would listen here now


def test_who_is_missing_is_told_to_all_that_came():
    told = roll_call(free_port(), [(0, 4), (2, 4)], timeout=0.6)
    assert told[0] == told[1]
    assert "num_processes=4, but of these the processes 1, 3 did not come within 1 s; start them" in told[0]
    assert "raise --initialization_timeout." in told[0]


def test_nobody_at_the_address():
    port = free_port()
    (told,) = roll_call(port, [(1, 2)], timeout=0.3)
    assert f"coordinator_address='127.0.0.1:{port}' was not reached from process 1 within 0 s (" in told
    assert "start process 0, check the address" in told


def test_different_numbers_of_processes_are_told_to_both():
    told = roll_call(free_port(), [(0, 2), (1, 3)], timeout=2)
    assert told[0] == told[1]
    assert "process 1 was started with num_processes=3, process 0 with num_processes=2; all processes" in told[0]


def test_a_process_id_that_comes_twice_is_told_to_all_three():
    told = roll_call(free_port(), [(0, 3), (1, 3), (1, 3)], timeout=2)
    assert len(set(told)) == 1
    assert "process_id=1 came twice or is not one of 0 ... 2; every process needs its own number" in told[0]


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (told,) = roll_call(port, [(0, 2)], timeout=1)
    assert f"coordinator_address='127.0.0.1:{port}': process 0 cannot listen on port {port} (" in told
    assert told.endswith("it must be free on the machine of process 0: choose another port.")


STRANGERS = {
    "is silent": b"",
    "speaks HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "no text": b"\xff\xfe\x00\n",
    "other JSON": b"[1, 2]\n",
    "other keys": json.dumps({"process_id": None, "num_processes": 2}).encode() + b"\n",
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_on_the_port_is_ignored(stranger, monkeypatch):
    monkeypatch.setattr(rendezvous, "_LINE_SECONDS", 0.2)
    port = free_port()
    told: list[str] = []
    leader = threading.Thread(target=lambda: told.extend(roll_call(port, [(0, 2)])))
    leader.start()
    say(port, STRANGERS[stranger])
    assert roll_call(port, [(1, 2)]) == [""]
    leader.join(10)
    assert told == [""]
