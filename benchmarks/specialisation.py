"""Do experts specialise if stage III is trained long enough, and does STGC change it?

    python -m benchmarks.specialisation --stage2 runs/moe_tuning/stage2/model --out runs/specialisation

Trains stage III of the tiny chain from one checkpoint of stage II in many settings, three seeds each: its length, the
coefficient of the balance loss, STGC's threshold, coefficient and layers, and the routers. After each run, `analyze`
routes held-out questions. Writes results.jsonl, a line a run as soon as it is done (the same command goes on from
there), and page.html: a curve for each question and each figure, and a verdict by a rule that is fixed beforehand
(`verdict`).

Synthetic infographics; the figures are those of first choices, means over MoE layers.
"""

import argparse
import base64
import html
import json
import pathlib
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import pairing
from moe_vlm_jax.analysis import drawing
from moe_vlm_jax.evaluation import markup, outputs

CONFIG = ("--config", "configs/stage3.py:tiny-moe_only")
SEEDS = (0, 1, 2)
STEPS = 1000  # of every run but those that ask for the length
STGC = {"training.stgc.coefficient": 1.0, "training.stgc.gradient": "full"}
FIGURES = {
    "exact_match": "exact match, held-out questions",
    "modality_bits": "mutual information of expert and modality (bit)",
    "kind_bits": "mutual information of expert and kind of word (bit)",
    "dominance": "dominance of one expert (0 = even)",
    "distance": "mean distance between experts",
}


class Sweep(NamedTuple):
    """One question: values of a setting, each with the overrides that set it.

    Attributes:
      ordered: the verdict compares the last value with the first; else every value with the first.
    """

    title: str
    values: Mapping[str, Mapping[str, Any]]
    ordered: bool = True


SWEEPS = {
    "length": Sweep(
        "steps of stage III", {str(n): {"training.max_steps": n} for n in (125, 250, 500, 1000, 2000, 4000)}
    ),
    "balance": Sweep(
        "coefficient of the balance loss", {str(c): {"model.moe.balance_coef": c} for c in (0.0, 0.01, 0.1, 1.0)}
    ),
    "beta": Sweep(
        "STGC's coefficient",
        {"off": {}} | {str(b): STGC | {"training.stgc.coefficient": b} for b in (0.1, 1.0, 10.0)},
        ordered=False,
    ),
    "tau": Sweep("STGC's threshold", {str(t): STGC | {"training.stgc.threshold": t} for t in (-0.2, 0.0, 0.2)}),
    "layers": Sweep(
        "layers with STGC's loss, experts in both layers",
        {
            name: {"model.moe.placement": "dense", **settings}
            for name, settings in {
                "none": {},
                "first": STGC | {"training.stgc.layers": (0, 1)},
                "second": STGC | {"training.stgc.layers": (1, 2)},
                "both": STGC,
            }.items()
        },
        ordered=False,
    ),
    "router": Sweep(
        "what decides, every question with its own image tokens",
        {
            name: {"data.share_prefix": False, "data.images_per_row": 8, **settings}
            for name, settings in {
                "topk": {},
                "topk and STGC": STGC,
                "modality": {
                    "model.moe.router": "modality",
                    "model.moe.text_experts": (0, 1),
                    "model.moe.image_experts": (2, 3),
                },
                "cluster": {"model.moe.router": "cluster", "model.moe.clusters": "@"},
            }.items()
        },
        ordered=False,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage2", type=pathlib.Path, required=True, help="checkpoint of configs/moe_tuning.py's stage2"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of every run but the length's (default {STEPS})")
    args = parser.parse_args()
    drawing.require()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = read(args.out)
    for sweep in args.sweeps:
        for value, overrides in SWEEPS[sweep].values.items():
            for seed in args.seeds:
                key = {"sweep": sweep, "value": value, "seed": seed, "steps": args.steps}
                if any(row["key"] == key for row in rows):
                    continue
                settings = {"training.max_steps": args.steps, **overrides, "training.seed": seed}
                if "model.moe.clusters" in settings:
                    settings["model.moe.clusters"] = clusters(args.out, args.stage2)
                rows.append({"key": key, **run(args.out / sweep / value / f"seed{seed}", args.stage2, settings)})
                with (args.out / "results.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    chosen = [row for row in rows if row["key"]["steps"] == args.steps]
    outputs.write_atomically(args.out / "page.html", page(chosen))
    print("\n".join(sentence for sweep in SWEEPS for sentence in verdict(chosen, sweep)))
    print(f"page: {args.out / 'page.html'}")


def read(out: pathlib.Path) -> list[dict]:
    """Returns the runs that are done."""
    path = out / "results.jsonl"
    return outputs.read_predictions(path) if path.is_file() else []


def clusters(out: pathlib.Path, stage2: pathlib.Path) -> pathlib.Path:
    """Returns the clusters of the training questions, made if they are not there."""
    path = (out / "clusters.npz").resolve()
    if not path.exists():
        call(["cluster_questions", *CONFIG, f"--config.training.base={stage2.resolve()}", "--target", str(path)])
    return path


def run(workdir: pathlib.Path, stage2: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Trains, analyses and returns FIGURES."""
    train = ["train", *CONFIG, "--workdir", str(workdir)]
    settings = {"training.base": stage2.resolve(), "evaluation.controls": False, **settings}
    call(train + [f"--config.{name}={value}" for name, value in settings.items()])
    target = workdir / "analysis"
    call(["analyze", "--workdir", str(workdir), "--num-samples", "1000", "--target", str(target)])
    routing = json.loads((target / "routing.json").read_text(encoding="utf-8"))
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    layers = routing["counting"]["top-1"]["layers"]

    def mean(values: Sequence[float]) -> float:
        return statistics.mean(values)

    pairs = [d for row in routing["weights"] for i, line in enumerate(row["distances"]) for d in line[:i]]
    return {
        "exact_match": results["after"]["exact_match"],
        "modality_bits": mean([layer["information"]["modality"]["bits"] for layer in layers]),
        "kind_bits": mean([layer["information"]["kind"]["bits"] for layer in layers]),
        "dominance": mean([layer["dominance"] for layer in layers]),
        "distance": mean(pairs),
    }


def call(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", f"moe_vlm_jax.{arguments[0]}", *arguments[1:]]
    environment = pairing.child_environment() | pairing.KEEP_BUFFERS
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=pairing.ROOT, env=environment)


def by_value(rows: Sequence[dict], sweep: str, figure: str) -> dict[str, list[float]]:
    """Returns the seeds' values of a figure for each value of a sweep that was run."""
    found = {
        value: [r[figure] for r in rows if (r["key"]["sweep"], r["key"]["value"]) == (sweep, value)]
        for value in SWEEPS[sweep].values
    }
    return {value: seeds for value, seeds in found.items() if seeds}


def verdict(rows: Sequence[dict], sweep: str) -> list[str]:
    """Returns a sentence for each figure and comparison of a sweep (`Sweep.ordered`).

    A difference counts when no seed of the one lies among the seeds of the other.
    """
    sentences = []
    for figure, title in FIGURES.items():
        (first, a), *others = by_value(rows, sweep, figure).items() or [("", [])]
        for other, b in others[-1:] if SWEEPS[sweep].ordered else others:
            if min(len(a), len(b)) < 2:
                continue
            apart = max(a) < min(b) or max(b) < min(a)
            change = f"{statistics.mean(a):.3f} at {first}, {statistics.mean(b):.3f} at {other}"
            more = "more" if statistics.mean(b) > statistics.mean(a) else "less"
            said = more if apart else "no difference beyond seeds"
            sentences.append(f"{SWEEPS[sweep].title}: {title}: {change}: {said}")
    return sentences


@drawing.styled
def curves(rows: Sequence[dict], sweep: str) -> bytes:
    """Returns a PNG: every figure over the values of a sweep, the seeds as dots and their mean as a line."""
    figure, axes = drawing.grid(2.6, 1, len(FIGURES))
    for ax, (name, title) in zip(axes.flat, FIGURES.items(), strict=True):
        found = by_value(rows, sweep, name)
        for x, seeds in enumerate(found.values()):
            ax.plot([x] * len(seeds), seeds, "o", color=drawing.SKY, markersize=4)
        means = [statistics.mean(seeds) for seeds in found.values()]
        ax.plot(range(len(found)), means, "_-" if SWEEPS[sweep].ordered else "_", color=drawing.BLUE, markersize=14)
        ax.set_xticks(range(len(found)), list(found), fontsize=8, rotation=45)
        ax.set_title("\n".join(textwrap.wrap(title, 26)), fontsize=8)
    figure.supxlabel(SWEEPS[sweep].title, fontsize=9)
    return drawing.png(figure)


def page(rows: Sequence[dict]) -> str:
    """Returns the page of the runs that were made."""
    parts = []
    for sweep in SWEEPS:
        title = SWEEPS[sweep].title
        if not by_value(rows, sweep, "exact_match"):
            continue
        data = base64.b64encode(curves(rows, sweep)).decode()
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict(rows, sweep))
        parts.append(
            f'<h2>{html.escape(title)}</h2><img style="max-width:100%" alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{data}"><ul>{items}</ul>'
        )
    note = (
        "Stage III of the tiny chain on synthetic infographics, from one checkpoint of stage II. Dots are seeds, lines "
        "their means, joined where values have an order. A difference counts when no seed of a value lies among those "
        "of the first value."
    )
    return markup.document(title="Do experts specialise?", note=note, style="", body="".join(parts))


if __name__ == "__main__":
    main()
