"""A judge behind a local endpoint: retries, failures, resuming, and what is written down."""

import http.server
import json
import threading

import pytest

from moe_vlm_jax.data import json_lines
from moe_vlm_jax.evaluation import judging, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark

TASK = benchmark.JudgeTask(
    needed=lambda row, config: row["id"] != "skip",
    prompt=lambda row, config: f"grade {row['prediction']}",
    retry_prompt=lambda row, config: f"grade {row['prediction']} again",
    parse=lambda reply, config: float(reply) if reply.replace(".", "").isdigit() else None,
    offline=lambda row, config: 0.25,
    offline_name="a quarter",
    required=True,
    label="{judge}",
    official_models=(),
    max_tokens=3,
    temperature=0.0,
    temperature_step=0.5,
)
CONFIG = settings.BenchmarkConfig(split="test", rule="llava", max_new_tokens=1)
ROWS = [{"id": name, "prediction": f"answer {name}"} for name in ("a", "skip", "b", "c")]


class Server:
    """An OpenAI-compatible endpoint that gives the listed replies: text, an HTTP status, or raw bytes."""

    def __init__(self, *replies: str | int | bytes):
        self.replies, self.requests = list(replies), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                reply = outer.replies.pop(0) if outer.replies else 500
                status = reply if isinstance(reply, int) else 200
                content = reply if isinstance(reply, bytes) else json.dumps(completion(reply)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(text) -> dict:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "judge-2024",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": str(text)}}],
    }


def ask(server: Server, path, rows=ROWS, **values):
    waits: list[float] = []
    config = settings.EndpointConfig(**{"url": server.url, "model": "judge", "attempts": 3, "wait": 2.0} | values)
    endpoint = judging.Endpoint(config, "secret")
    return judging.ask_all(rows, TASK, CONFIG, endpoint, path / "judge.jsonl", sleep=waits.append), waits


def lines(path) -> list[dict]:
    return [row for _, row in json_lines.read(path / "judge.jsonl")]


def test_the_request_is_what_the_official_client_sends():
    openai = pytest.importorskip("openai")
    with Server("1", "1") as server:
        judging.Endpoint(settings.EndpointConfig(url=server.url + "/", model="judge"), "secret").ask(
            "grade", temperature=0.5, max_tokens=3
        )
        client = openai.OpenAI(base_url=server.url, api_key="secret")
        said = client.chat.completions.create(
            model="judge", messages=[{"role": "user", "content": "grade"}], temperature=0.5, max_tokens=3
        )
    mine, theirs = server.requests
    assert mine == theirs
    assert said.choices[0].message.content == "1"  # so the server here answers as a real one does


def test_every_answer_gets_its_verdict_and_every_call_is_written_down(tmp_path):
    with Server("1", "0.5", "0") as server:
        found, waits = ask(server, tmp_path)
    assert found.by_id == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert waits == []
    line = lines(tmp_path)[1]
    assert (line["id"], line["prompt"], line["reply"], line["verdict"]) == ("b", "grade answer b", "0.5", 0.5)
    assert (line["model"], line["served"], line["url"]) == ("judge", "judge-2024", server.url)
    assert line["date"].endswith("+00:00")
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()
    assert {key: found.summary[key] for key in ("judged", "unjudged", "failed", "unparsed", "served")} == {
        "judged": 3,
        "unjudged": 0,
        "failed": 0,
        "unparsed": 0,
        "served": ["judge-2024"],
    }


def test_a_reply_without_a_verdict_is_asked_again_otherwise_and_warmer(tmp_path):
    with Server("good", "fine", "0.3", "1", "1") as server:
        found, _ = ask(server, tmp_path)
    assert found.by_id["a"] == 0.3
    bodies = [body for _, _, body in server.requests[:3]]
    assert [body["messages"][0]["content"] for body in bodies] == [
        "grade answer a",
        "grade answer a again",
        "grade answer a again",
    ]
    assert [body["temperature"] for body in bodies] == [0.0, 0.5, 1.0]
    assert found.summary["unparsed"] == 2


def test_a_failing_call_is_tried_again_after_growing_waits(tmp_path):
    with Server(500, b"no json", "0.7", "1", "1") as server:
        found, waits = ask(server, tmp_path)
    assert found.by_id["a"] == 0.7
    assert waits == [2.0, 4.0]
    assert found.summary["failed"] == 2


def test_failures_leave_an_answer_unjudged_and_never_give_it_a_zero(tmp_path):
    with Server("1", 500, 503, 500, "0.5") as server:
        found, _ = ask(server, tmp_path)
    assert found.by_id == {"a": 1.0, "c": 0.5}
    assert (found.summary["unjudged"], found.summary["failed"]) == (1, 3)
    assert [line["verdict"] for line in lines(tmp_path)] == [1.0, None, None, None, 0.5]


def test_replies_that_never_hold_a_verdict_leave_it_unjudged_and_the_others_are_asked(tmp_path):
    with Server("x", "y", "z", "0.5", "1") as server:
        found, _ = ask(server, tmp_path)
    assert found.by_id == {"b": 0.5, "c": 1.0}
    assert (found.summary["unjudged"], found.summary["unparsed"], found.summary["failed"]) == (1, 3, 0)


def test_a_refused_key_stops_at_once(tmp_path):
    with Server(401) as server:
        found, waits = ask(server, tmp_path)
    assert (len(server.requests), waits, found.summary["unjudged"]) == (1, [], 3)
    assert lines(tmp_path)[0]["error"].startswith("HTTP 401")


def test_an_endpoint_that_is_gone_is_given_up_after_three_answers(tmp_path):
    rows = [{"id": str(i), "prediction": "x"} for i in range(9)]
    with Server() as server:
        found, _ = ask(server, tmp_path, rows, attempts=1)
    assert len(server.requests) == 3
    assert found.summary["unjudged"] == 9
    closed, _ = ask(server, tmp_path, rows, attempts=1)  # nobody listens
    assert closed.summary["failed"] == 6


def test_the_same_call_again_asks_only_for_what_has_no_verdict(tmp_path):
    with Server("1", 401) as server:
        ask(server, tmp_path)
        with (tmp_path / "judge.jsonl").open("a") as file:
            file.write('{"id": "c", "ver')  # killed in the middle of a line
        server.replies = ["0.5", "0.25"]
        found, _ = ask(server, tmp_path)
        assert found.by_id == {"a": 1.0, "b": 0.5, "c": 0.25}
        assert len(server.requests) == 4
        again, _ = ask(server, tmp_path)
    assert len(server.requests) == 4
    assert again == found
    assert again.summary["failed"] == 1  # of an earlier call, still counted


def test_verdicts_of_another_judge_or_on_another_answer_do_not_mix(tmp_path):
    with Server("1", "1", "1") as server:
        ask(server, tmp_path)
        with pytest.raises(ValueError, match=r"verdicts of endpoint\.model='judge', now it is 'other'"):
            ask(server, tmp_path, model="other")
        changed = [ROWS[0] | {"prediction": "new"}, *ROWS[1:]]
        with pytest.raises(ValueError, match=r"judge\.jsonl:1: 'a' was judged with another text"):
            ask(server, tmp_path, changed)
    assert len(server.requests) == 3


def test_the_offline_stand_in_is_named_as_such():
    found = judging.offline(ROWS, TASK, CONFIG)
    assert found.by_id == {"a": 0.25, "b": 0.25, "c": 0.25}
    assert found.summary["kind"] == "offline"
