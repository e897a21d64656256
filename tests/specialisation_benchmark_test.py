"""The sweep's verdict and page, from rows that were not measured."""

import json
import pathlib

import pytest

from benchmarks import specialisation

FIGURE = "kind_bits"


def rows(sweep: str, values: dict[str, list[float]]) -> list[dict]:
    """Returns runs in which all figures but one are the same."""
    same = dict.fromkeys(specialisation.FIGURES, 0.5)
    return [
        {"key": {"sweep": sweep, "value": value, "seed": seed, "steps": 5}, **same, FIGURE: figure}
        for value, figures in values.items()
        for seed, figure in enumerate(figures)
    ]


def said(sweep: str, values: dict[str, list[float]]) -> list[str]:
    title = specialisation.FIGURES[FIGURE]
    sentences = specialisation.verdict(rows(sweep, values), sweep)
    return [sentence.partition(f"{title}: ")[2] for sentence in sentences if title in sentence]


def test_an_ordered_sweep_compares_its_ends_and_counts_what_no_seed_contradicts():
    values = {"125": [0.1, 0.3], "500": [9.0, 9.0], "4000": [0.4, 0.6]}
    assert said("length", values) == ["0.200 at 125, 0.500 at 4000: more"]
    values["4000"] = [0.05, 0.02]
    assert said("length", values) == ["0.200 at 125, 0.035 at 4000: less"]
    values["4000"] = [0.3, 0.6]
    assert said("length", values) == ["0.200 at 125, 0.450 at 4000: no difference beyond seeds"]


def test_a_sweep_without_an_order_compares_every_value_with_the_first():
    values = {"topk": [0.1, 0.2], "modality": [0.4, 0.5], "cluster": [0.15, 0.6]}
    assert said("router", values) == [
        "0.150 at topk, 0.450 at modality: more",
        "0.150 at topk, 0.375 at cluster: no difference beyond seeds",
    ]


def test_one_seed_or_one_value_gives_no_verdict():
    assert said("length", {"125": [0.1], "4000": [0.4, 0.6]}) == []
    assert said("length", {"125": [0.1, 0.2]}) == []
    assert said("length", {}) == []


def test_the_page_shows_the_sweeps_that_were_run():
    found = specialisation.page(rows("balance", {"0.0": [0.1, 0.3], "1.0": [0.4, 0.6]}))
    assert found.count("<img") == 1
    assert "coefficient of the balance loss" in found
    assert "0.200 at 0.0, 0.500 at 1.0: more" in found


def test_runs_that_are_done_are_not_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def run(workdir: pathlib.Path, stage2: pathlib.Path, settings: dict) -> dict:
        made.append((settings["model.moe.balance_coef"], settings["training.seed"], settings["training.max_steps"]))
        if len(made) == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(specialisation.FIGURES, 1.0)

    monkeypatch.setattr(specialisation, "run", run)
    arguments = ["--stage2", "s", "--out", str(tmp_path), "--sweeps", "balance", "--seeds", "0", "1", "--steps", "5"]
    monkeypatch.setattr("sys.argv", ["specialisation", *arguments])
    with pytest.raises(KeyboardInterrupt):
        specialisation.main()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    specialisation.main()
    assert made == [(c, s, 5) for c in (0.0, 0.01) for s in (0, 1)][:3] + [
        (c, s, 5) for c in (0.01, 0.1, 1.0) for s in (0, 1)
    ]
    done = [json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(key["value"], key["seed"]) for key in done] == [
        (v, s) for v in ("0.0", "0.01", "0.1", "1.0") for s in (0, 1)
    ]
    assert "no difference beyond seeds" in capsys.readouterr().out
    assert (tmp_path / "page.html").is_file()
