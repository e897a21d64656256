"""A judge for answers that no rule can score: a chat endpoint, or a rule that stands in for it.

Every call is written into judge.jsonl before the next one:

    {"id", "attempt", "url", "model", "served", "date", "temperature", "prompt", "reply", "error", "verdict"}

A call that fails is counted and never becomes a grade: the answer stays unjudged, and the same command asks again.
"""

import dataclasses
import datetime
import http.client
import json
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging

from moe_vlm_jax.data import bad_samples, json_lines
from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import benchmark

GIVE_UP_AFTER = 3  # answers in a row for which every call failed: the endpoint is gone
_HOPELESS = (400, 401, 403, 404, 405, 422)  # what the same request would be answered with again


class CallError(Exception):
    """A call that gave no reply. Attributes: hopeless: whether it would fail again."""

    def __init__(self, message: str, *, hopeless: bool):
        super().__init__(message)
        self.hopeless = hopeless


class Reply(NamedTuple):
    """Attributes: text; model: the name that the endpoint gives itself."""

    text: str
    model: str


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint.

    Attributes:
      config: where it is.
      key: sent with each call, written nowhere; '' sends none.
    """

    config: settings.EndpointConfig
    key: str = dataclasses.field(repr=False)

    def ask(self, prompt: str, *, temperature: float, max_tokens: int) -> Reply:
        """Returns the reply to one user message; CallError where there is none."""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        request = urllib.request.Request(
            self.config.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                content = json.loads(response.read())
            text = content["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise CallError(f"HTTP {error.code}: {said}", hopeless=error.code in _HOPELESS) from error
        except (OSError, http.client.HTTPException) as error:
            raise CallError(f"{type(error).__name__}: {error}", hopeless=False) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CallError(f"the reply is no chat completion ({error!r})", hopeless=False) from error
        if not isinstance(text, str):
            raise CallError(f"the reply's content is {text!r:.80}, not text", hopeless=False)
        return Reply(text, str(content.get("model", "")))


@dataclasses.dataclass
class Verdicts:
    """What a judge said of a set.

    Attributes:
      by_id: verdict of each answer that has one.
      summary: for results.json: kind, model, served, first, last, judged, failed, unparsed, unjudged.
    """

    by_id: dict[str, Any]
    summary: dict[str, Any] | None


def offline(rows: Sequence[benchmark.Row], task: benchmark.JudgeTask, config: settings.BenchmarkConfig) -> Verdicts:
    """Returns the stand-in's verdicts."""
    if task.offline is None:
        return Verdicts({}, {"kind": "offline", "model": None, "judged": 0, "unjudged": 0, "failed": 0})
    found = {row["id"]: task.offline(row, config) for row in rows if task.needed(row, config)}
    return Verdicts(found, {"kind": "offline", "model": None, "judged": len(found), "unjudged": 0, "failed": 0})


def ask_all(
    rows: Sequence[benchmark.Row],
    task: benchmark.JudgeTask,
    config: settings.BenchmarkConfig,
    endpoint: Endpoint,
    path: pathlib.Path,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Verdicts:
    """Returns the endpoint's verdicts, those in the file and those of the answers that had none there.

    Args:
      rows: answered ones.
      task: what to ask.
      config: of the set.
      endpoint: the judge.
      path: judge.jsonl; grown.
      sleep: waits between attempts.

    Raises:
      ValueError: the file holds verdicts of another judge, or on other answers.
    """
    needed = [row for row in rows if task.needed(row, config)]
    lines = _read(path, {row["id"]: row for row in needed}, task, config, endpoint.config)
    found = {line["id"]: line["verdict"] for line in lines if line["verdict"] is not None}
    journal, lost = json_lines.Journal(path), 0
    try:
        for number, row in enumerate(needed):
            if row["id"] in found:
                continue
            made, hopeless = _judge(row, task, config, endpoint, journal, sleep)
            lines += made
            if made[-1]["verdict"] is not None:
                found[row["id"]] = made[-1]["verdict"]
            lost = lost + 1 if all(line["error"] for line in made) else 0
            if hopeless or lost >= GIVE_UP_AFTER:
                logging.error(
                    "the judge at %s does not answer (%s); the other answers stay unjudged", endpoint.config.url,
                    made[-1]["error"],
                )  # fmt: skip
                break
            if number % 20 == 19:
                logging.info("judged %d of %d answers", len(found), len(needed))
    finally:
        journal.close()
    return Verdicts(found, _summary(lines, len(needed), found, endpoint.config))


def _judge(row, task, config, endpoint: Endpoint, journal, sleep) -> tuple[list[dict], bool]:
    """Asks until there is a verdict; returns the lines, at least one, and whether asking is hopeless."""
    lines: list[dict] = []
    prompt, temperature, failures = task.prompt(row, config), task.temperature, 0
    for attempt in range(endpoint.config.attempts):
        if failures and lines[-1]["error"]:
            sleep(endpoint.config.wait * 2 ** (failures - 1))
        line = {
            "id": row["id"],
            "attempt": attempt,
            "url": endpoint.config.url,
            "model": endpoint.config.model,
            "served": None,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "temperature": temperature,
            "prompt": prompt,
            "reply": None,
            "error": None,
            "verdict": None,
        }
        hopeless = False
        try:
            reply = endpoint.ask(prompt, temperature=temperature, max_tokens=task.max_tokens)
        except CallError as error:
            line["error"], hopeless = str(error), error.hopeless
            failures += 1
        else:
            line |= {"served": reply.model, "reply": reply.text, "verdict": task.parse(reply.text, config)}
            prompt, temperature = task.retry_prompt(row, config), temperature + task.temperature_step
        with journal.locked():
            journal.append(line)
        lines.append(line)
        if hopeless or line["verdict"] is not None:
            return lines, hopeless
    return lines, False


def _read(path: pathlib.Path, rows: dict[str, benchmark.Row], task, config, endpoint) -> list[dict]:
    """Returns the lines of an earlier call, which must be of this judge and on these answers."""
    lines: list[dict] = []
    if not path.exists():
        return lines
    for name, line in json_lines.read(path):
        if isinstance(line, bad_samples.SampleError):
            if line.kind == json_lines.HALF_WRITTEN:
                continue
            raise ValueError(f"{path.parent / name}: {line.fault}")
        for field, mine in (("url", endpoint.url), ("model", endpoint.model)):
            if line[field] != mine:
                raise ValueError(
                    f"{path}: verdicts of endpoint.{field}={line[field]!r}, now it is {mine!r}; verdicts of two judges "
                    "do not mix; restore it, or move the file away."
                )
        row = rows.get(line["id"])
        if row is None or line["prompt"] not in (task.prompt(row, config), task.retry_prompt(row, config)):
            raise ValueError(
                f"{path.parent / name}: {line['id']!r} was judged with another text than now (judge_prompt, rule or "
                "the answer changed); restore it, or move the file away."
            )
        lines.append(line)
    return lines


def _summary(lines: list[dict], needed: int, found: dict[str, Any], config: settings.EndpointConfig) -> dict[str, Any]:
    dates = [line["date"] for line in lines]
    return {
        "kind": "endpoint",
        "url": config.url,
        "model": config.model,
        "served": sorted({line["served"] for line in lines if line["served"]}),
        "first": min(dates, default=None),
        "last": max(dates, default=None),
        "judged": len(found),
        "unjudged": needed - len(found),
        "failed": sum(line["error"] is not None for line in lines),
        "unparsed": sum(line["error"] is None and line["verdict"] is None for line in lines),
    }
