"""Folders of results as `python -m moe_vlm_jax.evaluate` writes them, small and made by hand."""

import copy
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation
from moe_vlm_jax.models import presets
from moe_vlm_jax.reporting import folders
from moe_vlm_jax.reporting.evaluations import Evaluation

LED = "What is the maximum forward current of the LED?"
# The cases of the project report's figures 4 and 5 in spirit: a wrong unit, a sentence, the bare quantity.
CASES: tuple[dict[str, Any], ...] = (
    {"id": "led", "asked": LED, "answers": ["20 mA"], "domain": "electrical"},
    {"id": "peak", "asked": "At what time is the peak?", "answers": ["210 s"], "domain": "thermal"},
    {"id": "loop", "asked": "How often does the loop run?", "answers": ["4", "four"], "domain": "software"},
    {"id": "chip", "asked": "Which chip is this?", "answers": ["NE555"], "domain": "electrical"},
)
ANSWERS = {
    "baseline": ["The LED is designed to support a maximum forward current of 20A", "It is 3 min", "5", "a chip"],
    "sft": ["The LED can support a maximum forward current of 20 mA.", "210 s", "4", "NE555"],
    "dpo": ["20mA", "3.5 min", "4", "NE556"],
}
SCORES = {"baseline": [0.0, 0.0, 0.0, 0.0], "sft": [0.5, 1.0, 1.0, 1.0], "dpo": [1.0, 0.6, 1.0, 0.0]}


def manifest() -> dict:
    """Returns a manifest: MoE-LLaVA with Phi-2 and four experts in every second layer."""
    config = config_lib.RunConfig(model=presets.vlm(presets.clip_l_336(), presets.phi2()))
    fields = json.loads(json.dumps(validation.flatten(config)))
    return {
        "checkpoint": {"path": "checkpoints/phi2", "kind": "checkpoint", "step": None, "hash": "abc"},
        "config": {name: value for name, value in fields.items() if name.startswith("model.")},
        "versions": {"jax": "0.10.2"},
        "device": "1 x cpu",
        "started": "2026-11-26T10:00:00+00:00",
        "finished": "2026-11-26T10:20:30+00:00",
        "parameters": {"total": 11, "activated": 7},
    }


def benchmark(score: float | None, count: int, **changes: Any) -> dict:
    """Returns a benchmark of results.json."""
    return {
        "title": "MM-Vet",
        "rule": "llava",
        "label": "containment, no judge",
        "comparable": True,
        "split": "test",
        "metric": "score",
        "score": score,
        "scores": {},
        "count": count,
        "skipped": {},
        "judge": None,
        "submission": None,
        **changes,
    }


def row(name: str, score: float | None, **changes: Any) -> dict:
    """Returns a line of predictions.jsonl."""
    return {
        "id": name,
        "question": f"{name}?\nAnswer in one word.",
        "asked": f"{name}?",
        "images": [],
        "answers": ["yes"],
        "prediction": "yes" if score else "no",
        "truncated": False,
        "group": {},
        "unit": name,
        "score": score,
        **changes,
    }


def write(
    folder: pathlib.Path, benchmarks: Mapping[str, tuple[dict, Sequence[Mapping]]], head: dict | None = None
) -> pathlib.Path:
    """Writes a folder of results: name of a benchmark -> (its figures, its lines)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, lines) in benchmarks.items():
        (folder / name).mkdir(exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name / "predictions.jsonl").write_text(text, encoding="utf-8")
    results = {"manifest": head or manifest(), "benchmarks": {name: found for name, (found, _) in benchmarks.items()}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def one_model(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Writes what baseline, sft or dpo left: cases with pictures, POPE, MMBench with rotations, MME and GQA."""
    image = folder / "mmvet" / "images" / "led.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (900, 300), (200, 30, 30)).save(image)
    lines = [
        row(
            case["id"],
            score,
            asked=case["asked"],
            answers=case["answers"],
            prediction=text,
            images=["images/led.png"] if case["id"] in ("led", "chip") else [],
            group={"domain": case["domain"], "capability": ["rec", "ocr"][: 1 + (case["id"] == "led")]},
        )
        for case, text, score in zip(CASES, ANSWERS[name], SCORES[name], strict=True)
    ]
    better = list(SCORES).index(name)
    pope = [row(f"adversarial-{i}", float((i * 7) % 10 < 5 + better)) for i in range(40)]
    turns = [
        row(f"{i}-{turn}", float((i + turn * better) % (2 + better) != 0), unit=f"m{i}", group={"category": "ocr"})
        for i in range(20)
        for turn in range(3)
    ]
    circular = sum(all(line["score"] for line in turns[i * 3 : i * 3 + 3]) for i in range(20)) / 20
    gqa = [row(f"g{i}", float(i % 5 < 3 + better / 2)) for i in range(30)]
    judged = {"title": "MM-Vet", "comparable": False, "scores": {"by capability": {"rec": 40.0, "ocr": 31.5}}}
    return write(
        folder,
        {
            "mmvet": (benchmark(100 * sum(SCORES[name]) / 4, 4, **judged), lines),
            "pope": (
                benchmark(
                    60.0 + 9 * better,
                    40,
                    title="POPE",
                    metric="F1",
                    label="mean F1 of the splits",
                    scores={"accuracy": 50.0 + 10 * better, "yes ratio": 51.2, "by split": {"adversarial": 60.0}},
                ),
                pope,
            ),
            "mmbench": (
                benchmark(
                    100 * circular,
                    60,
                    title="MMBench",
                    rule="vlmevalkit",
                    metric="accuracy",
                    label="dev, circular, rule matching only (no LLM extraction)",
                    split="dev",
                ),
                turns,
            ),
            "mme": (benchmark(1300.5 + better, 0, title="MME", rule="official", metric="perception"), []),
            "gqa": (
                benchmark(
                    100 * sum(line["score"] for line in gqa) / 30, 30, title="GQA", metric="accuracy", label="balanced"
                ),
                gqa,
            ),
        },
    )


def three_models(tmp_path: pathlib.Path) -> list[Evaluation]:
    """Returns baseline, sft and dpo, read from their folders."""
    return [one for name in ANSWERS for one in folders.read(str(one_model(tmp_path / name, name)))]


def changed(lines: Sequence[Mapping], index: int, **changes: Any) -> list[dict]:
    """Returns a copy of lines with one of them changed."""
    lines = [dict(copy.deepcopy(line)) for line in lines]
    lines[index] |= changes
    return lines
