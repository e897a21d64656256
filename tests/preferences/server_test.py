"""The annotation server: what it shows, what it refuses, and that a kill loses no mark."""

import contextlib
import functools
import http.client
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from subprocess import PIPE

import pytest
from PIL import Image

from moe_vlm_jax import origins
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.preferences import annotate, candidates, marks, server
from tests.preferences import examples

JSON = {"Content-Type": "application/json"}


class Client:
    """Sends requests to a server, exactly as they are written."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        self.port, self.host = port, host

    def send(self, method: str, path: str, body: str | None = None, **headers: str):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def view(self) -> dict:
        answer, body = self.send("GET", "/view")
        assert answer.status == 200
        return json.loads(body)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict]:
        headers = {"Content-Type": "application/json", **headers}
        answer, text = self.send("POST", path, json.dumps(body), **headers)
        return answer.status, json.loads(text)


@pytest.fixture
def serve(tmp_path):
    running = []

    def serve(host=origins.LOOPBACK, count=3, found=None, annotator="ana"):
        if found is None:
            path = examples.write_candidates(tmp_path, count)
            found = candidates.read_candidates(path, bad_samples.BadSamples("error"))
        session = annotate.Session(found, tmp_path / "m.jsonl", annotator)
        served = server.Server(session, host, 0)
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((served, thread, session))
        return Client(served.server_address[1])

    yield serve
    for served, thread, session in running:
        served.shutdown()
        thread.join()
        served.server_close()
        session.close()


def held(tmp_path, annotator="ana"):
    return {name: mark.mark for name, mark in marks.read_marks(tmp_path / "m.jsonl").held(annotator).items()}


def test_the_page_needs_nothing_from_elsewhere(serve):
    answer, body = serve().send("GET", "/")
    text = body.decode()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    (nonce,) = re.findall(r'<script nonce="([\w-]{20,})">', text)
    assert f"script-src 'nonce-{nonce}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "NONCE" not in text
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_marks_are_on_the_disk_when_the_answer_arrives(serve, tmp_path):
    client = serve()
    view = client.view()
    assert (view["annotator"], view["done"], view["total"], view["last"]) == ("ana", 0, 3, None)
    assert view["item"]["turns"] == [{"role": "human", "text": "What is q0?"}]
    assert sorted([view["item"]["left"], view["item"]["right"]]) == ["first 0", "second 0"]
    status, after = client.post("/mark", {"item": "q0", "choice": "right", "seconds": 2.5})
    assert status == 200
    assert held(tmp_path) == {"q0": view["item"]["right"].split()[0]}
    assert (after["item"]["id"], after["done"], after["last"]) == ("q1", 1, "q0")
    assert client.view() == after
    assert client.post("/undo", {"item": "q0"}) == (200, view)
    assert held(tmp_path) == {}
    for i in range(3):
        _, after = client.post("/mark", {"item": f"q{i}", "choice": "tie", "seconds": 1})
    assert "item" not in after
    assert "ana: 3 of 3 marked" in after["report"]


def test_a_second_key_for_the_same_item_is_a_conflict(serve, tmp_path):
    client = serve()
    assert client.post("/mark", {"item": "q0", "choice": "tie", "seconds": 1})[0] == 200
    status, said = client.post("/mark", {"item": "q0", "choice": "left", "seconds": 1})
    assert status == 409
    assert "was marked before" in said["error"]
    assert client.post("/undo", {"item": "q1"})[0] == 409
    assert held(tmp_path) == {"q0": "tie"}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/mark", {"item": "q9", "choice": "tie", "seconds": 1}, 400, "none of the 3 candidates"),
        ("/mark", {"item": "q0", "choice": "first", "seconds": 1}, 400, "choice='first'"),
        ("/mark", {"item": "q0", "choice": "tie", "seconds": "x"}, 400, "not a text and a number"),
        ("/mark", {"item": "q0", "choice": "tie", "seconds": float("nan")}, 400, "seconds=nan"),
        ("/mark", [1], 400, "not a text and a number"),
        ("/other", {"item": "q0"}, 404, "nothing can be posted here"),
        ("/mark?x=1", {"item": "q0"}, 404, "nothing can be posted here"),
    ],
)
def test_posts_that_make_no_sense_are_refused(serve, tmp_path, path, body, status, said):
    got, answer = serve().post(path, body)
    assert got == status
    assert said in answer["error"]
    assert held(tmp_path) == {}


def test_a_body_that_is_no_json_or_has_no_honest_length_is_refused(serve):
    client = serve()
    assert client.send("POST", "/mark", "{", Content_Type="application/json")[0].status == 400
    answer, body = client.send("POST", "/mark", "x" * 70_000, Content_Type="application/json")
    assert answer.status == 400
    assert b"at most 65536" in body
    assert client.send("POST", "/mark", "", Content_Type="application/json", Content_Length="-1")[0].status == 400
    assert client.send("POST", "/mark", "", Content_Type="application/json", Content_Length="9" * 5000)[0].status == 400


def test_a_disk_that_is_full_is_said_and_the_item_stays(serve, tmp_path, monkeypatch):
    client = serve()
    before = client.view()

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        status, said = client.post("/mark", {"item": "q0", "choice": "tie", "seconds": 1})
    assert status == 500
    assert "the mark was not saved: [Errno 28] No space left on device" in said["error"]
    assert client.view() == before
    assert held(tmp_path) == {}


def test_a_file_of_marks_that_is_replaced_meanwhile_is_said(serve, tmp_path):
    client = serve()
    (tmp_path / "m.jsonl").rename(tmp_path / "old")
    answer, body = client.send("GET", "/view")
    assert answer.status == 400
    assert b"removed, replaced or shortened" in body
    status, said = client.post("/mark", {"item": "q0", "choice": "tie", "seconds": 1})
    assert (status, "removed, replaced or shortened" in said["error"]) == (400, True)


def test_images_are_those_of_the_candidates(serve, tmp_path):
    client = serve()
    for i in range(3):
        answer, body = client.send("GET", f"/image/{i}/0")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
        assert body == (tmp_path / f"{i}.png").read_bytes()


def test_what_browsers_do_not_show_becomes_png(serve, tmp_path):
    found = [
        examples.candidate("q0", images=(examples.encoded("TIFF"), examples.encoded("JPEG"), examples.encoded("PPM")))
    ]
    client = serve(found=found)
    kinds = [client.send("GET", f"/image/0/{j}") for j in range(3)]
    assert [answer.headers["Content-Type"] for answer, _ in kinds] == ["image/png", "image/jpeg", "image/png"]
    assert [Image.open(io.BytesIO(body)).size for _, body in kinds] == [(64, 48)] * 3
    assert client.view()["item"]["images"] == ["/image/0/0", "/image/0/1", "/image/0/2"]


def test_an_image_that_is_gone_or_broken_is_an_error_that_says_so(serve, tmp_path):
    client = serve()
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("<svg><script>alert(1)</script></svg>")
    for i in (0, 1):
        answer, body = client.send("GET", f"/image/{i}/0")
        assert (answer.status, answer.headers["Content-Type"]) == (500, "application/json")
        assert b"cannot be shown" in body


TRAVERSALS = [
    "/../secret.txt",
    "/image/../secret.txt",
    "/image/0/../../secret.txt",
    "/image/%2e%2e/%2e%2e/secret.txt",
    "/image/0/%2e%2e%2fsecret.txt",
    "/image/..%2f..%2fsecret.txt",
    "/image/0/0/../../../secret.txt",
    "/image/0/-1",
    "/image/-1/0",
    "/image/0/1",
    "/image/3/0",
    "/image/٠/0".encode().decode("latin-1"),
    "/image/0/0\0",
    "/image/0x0/0",
    "/image//0",
    "/secret.txt",
    "/page.html",
    "//etc/passwd",
    "/image/{absolute}",
    "{absolute}",
    "/image/0/{absolute}",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_request_names_a_file(serve, tmp_path, path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    client = serve()
    request = (
        f"GET {path.format(absolute=secret)} HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(request.encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert int(answer.split()[1]) in (400, 404)
    assert b"the secret" not in answer
    assert b"root:" not in answer


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:{port}", True),
        ("localhost:{port}", True),
        ("LOCALHOST:9", True),  # through a tunnel
        ("[::1]:{port}", True),
        ("evil.example:{port}", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("192.0.2.7:{port}", False),
        ("", False),
        ("[", False),
        ("evil.example@127.0.0.1", True),  # no browser sends this; the host in it is ours
    ],
)
def test_requests_to_another_name_are_refused(serve, tmp_path, host, allowed):
    client = serve()
    host = host.format(port=client.port)
    for method, path, body in (("GET", "/view", None), ("GET", "/image/0/0", None), ("POST", "/mark", "{}")):
        answer, _ = client.send(method, path, body, Host=host, **JSON)
        assert (answer.status == 421) is not allowed
    assert held(tmp_path) == {}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://127.0.0.1:{port}"}, 200),  # behind a proxy that speaks TLS
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
    ],
)
def test_other_pages_cannot_post(serve, tmp_path, headers, status):
    client = serve()
    headers = {name: value.format(port=client.port) for name, value in headers.items()}
    assert client.post("/mark", {"item": "q0", "choice": "tie", "seconds": 1}, **headers)[0] == status
    assert held(tmp_path) == ({"q0": "tie"} if status == 200 else {})


def test_a_link_from_elsewhere_may_open_the_page_but_nothing_else(serve):
    client = serve()
    assert client.send("GET", "/", Sec_Fetch_Site="cross-site")[0].status == 200
    assert client.send("GET", "/image/0/0", Sec_Fetch_Site="cross-site")[0].status == 403
    assert client.send("PUT", "/mark", "{}")[0].status == 501


def test_it_listens_on_loopback_alone_unless_told_otherwise(serve, tmp_path):
    found = candidates.read_candidates(examples.write_candidates(tmp_path, 1), bad_samples.BadSamples("error"))
    session = annotate.Session(found, tmp_path / "m.jsonl", "ana")
    for host, loopback in ((origins.LOOPBACK, True), ("0.0.0.0", False)):
        with server.Server(session, host, 0) as served:
            assert served.server_address[0] == host
            assert served.guard.is_loopback() is loopback
            assert served.guard.is_this_host("192.0.2.7:8765") is not loopback
            assert not served.guard.is_this_host("evil.example")
            port = served.server_address[1]
            with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}"):
                server.Server(session, "127.0.0.1", port)
    with pytest.raises(ValueError, match="port 99999"):
        server.Server(session, origins.LOOPBACK, 99999)
    session.close()


class Process:
    """The command itself, in a process that can be killed."""

    def __init__(self, folder: pathlib.Path, annotator: str = "ana", *arguments: str):
        command = [sys.executable, "-m", "moe_vlm_jax.preferences", "annotate", "--candidates", str(folder / "c.jsonl")]
        command += ["--marks", str(folder / "m.jsonl"), "--annotator", annotator, "--port", "0", *arguments]
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        self.process = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, preexec_fn=heed)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        (port,) = re.findall(r"http://[\d.]+:(\d+)/", self.line)
        self.client = Client(int(port))

    def end(self, number: int) -> tuple[str, str]:
        """Sends the signal and returns what else was said."""
        os.kill(self.process.pid, number)
        return self.process.communicate(timeout=30)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_acknowledged_mark(tmp_path):
    examples.write_candidates(tmp_path, 12)
    acknowledged: dict[str, str] = {}
    for choice in ("left", "tie", "skip", "right"):
        running = Process(tmp_path)
        view = running.client.view()
        assert view["done"] == len(acknowledged)
        for _ in range(2):
            item = view["item"]
            word = {"left": item["left"], "right": item["right"]}.get(choice, choice).split()[0]
            status, view = running.client.post("/mark", {"item": item["id"], "choice": choice, "seconds": 1})
            assert status == 200
            acknowledged[item["id"]] = word
        # A third mark is on its way when the process dies: it may be there whole, or not at all.
        third = view["item"]["id"]
        thread = threading.Thread(target=post_and_ignore, args=(running.client, third))
        thread.start()
        running.end(signal.SIGKILL)
        thread.join()
        assert running.process.returncode == -signal.SIGKILL
        with (tmp_path / "m.jsonl").open("a") as file:  # and another was half written
            file.write('{"id": "q11", "annotator": "ana", "mark": "fir')
        found = held(tmp_path)
        if third in found:
            acknowledged[third] = "tie"
        assert found == acknowledged
    running = Process(tmp_path)
    assert running.client.view()["done"] == len(acknowledged)
    said, warned = running.end(signal.SIGTERM)
    assert running.process.returncode == 0
    assert f"ana: {len(acknowledged)} of 12 marked" in said
    assert "removed a half-written last line" in warned
    assert held(tmp_path) == acknowledged


def post_and_ignore(client: Client, item: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        client.post("/mark", {"item": item, "choice": "tie", "seconds": 1})


def test_two_annotators_mark_at_the_same_time_into_one_file(tmp_path):
    examples.write_candidates(tmp_path, 4)
    ana, ben = Process(tmp_path, "ana"), Process(tmp_path, "ben", "--host", "0.0.0.0")
    for i in range(4):
        for running, choice in ((ana, "left"), (ben, "tie" if i else "left")):
            assert running.client.post("/mark", {"item": f"q{i}", "choice": choice, "seconds": 1})[0] == 200
    assert ana.client.view()["report"] == ben.client.view()["report"].replace(
        "ben: 4 of 4 marked, 3 ties", "ana: 4 of 4 marked, 0 ties"
    ).replace("1 times of 1", "4 times of 4")
    assert "4 items marked by two or more" in ana.client.view()["report"]
    said, warned = ben.end(signal.SIGINT)
    assert "4 items marked by two or more" in said
    assert "warning: --host 0.0.0.0 lets everybody" in warned
    assert "warning" not in ana.end(signal.SIGINT)[1]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 8
