"""Figures of a log whose structure is known."""

import json

import numpy as np
import pytest

from moe_vlm_jax.analysis import summary
from tests.analysis import examples


@pytest.fixture(scope="module")
def found():
    return summary.summarize(examples.planted())


def test_disjoint_modalities_have_one_bit_and_equal_ones_none(found):
    apart, one, alike = found["counting"]["top-1"]["layers"]
    assert [layer["layer"] for layer in (apart, one, alike)] == list(examples.LAYERS)
    assert apart["divergence_bits"] == pytest.approx(1.0)
    assert one["divergence_bits"] == pytest.approx(0.0, abs=1e-12)
    assert alike["divergence_bits"] == pytest.approx(0.0, abs=1e-12)
    assert apart["text_share"] == [1.0, 1.0, 0.0, 0.0]
    assert one["text_share"] == [None, None, 0.5, None]
    assert alike["text_share"] == [0.5, 0.5, 0.5, None]  # twice as many image tokens, and no preference


def test_the_expert_tells_the_modality_where_modalities_are_apart_only(found):
    apart, one, alike = found["counting"]["top-1"]["layers"]
    third = -(1 / 3) * np.log2(1 / 3) - (2 / 3) * np.log2(2 / 3)  # 4 of 12 tokens are text
    assert apart["information"]["modality"]["bits"] == pytest.approx(third)
    assert apart["information"]["modality"]["share"] == pytest.approx(1.0)
    assert apart["information"]["kind"]["bits"] == pytest.approx(1.0)  # kinds alternate as experts 0 and 1 do
    # Of 4 parts, two go to each expert; of 8 regions, four.
    assert apart["information"]["part"]["bits"] == pytest.approx(1.0)
    assert apart["information"]["part"]["share"] == pytest.approx(0.5)
    assert apart["information"]["region"]["share"] == pytest.approx(1 / 3)
    for layer in (one, alike):
        assert layer["information"]["modality"]["bits"] == pytest.approx(0.0, abs=1e-12)


def test_loads_entropies_and_dominance(found):
    apart, one, alike = found["counting"]["top-1"]["layers"]
    assert apart["load"] == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert one["load"] == [0, 0, 1, 0]
    assert (one["load_entropy"], one["dominance"], one["most_chosen"]) == (0.0, 1.0, 2)
    assert alike["load_entropy"] == pytest.approx(np.log2(3) / 2)
    assert found["verdict"]["dominated_layers"] == [3]
    assert found["verdict"]["layers_alike"] == [3, 5]
    assert found["verdict"]["layers_apart"] == [1]
    h = -0.7 * np.log2(0.7) - 0.3 * np.log2(0.3)
    assert found["router_entropy_bits"] == pytest.approx([h] * 3, rel=1e-3)  # probabilities are float16


def test_all_choices_count_second_ones_too(found):
    apart, one, _ = found["counting"]["top-k"]["layers"]
    # Text: 0+1 and 1+2; images: 2+3 and 3+0. p = [1/4, 1/2, 1/4, 0], q = [1/4, 0, 1/4, 1/2]: half of each is shared.
    assert apart["divergence_bits"] == pytest.approx(0.5)
    assert one["load"] == [0, 0, 0.5, 0.5]
    assert one["dominance"] == pytest.approx(1.0)
    assert sum(apart["class_tokens"]["modality"]) == 72  # tokens, not choices


def test_the_paths_are_those_that_were_planted(found):
    paths = found["counting"]["top-1"]["paths"]
    assert paths["distinct"] == 12
    assert paths["tokens"] == 72
    assert paths["paths"][0] in ([2, 2, 0], [2, 2, 1], [2, 2, 2], [3, 2, 0], [3, 2, 1], [3, 2, 2])
    assert paths["image"][:6] == [8] * 6
    assert paths["text"][:6] == [0] * 6
    assert found["counting"]["top-k"]["paths"]["paths"][0][1] == [2, 3]


def test_the_summary_is_json_without_nan(found):
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["tokens"] == {"text": 24, "image": 48}


def test_curves_are_what_the_run_logged_and_nothing_where_it_logged_none(tmp_path):
    assert summary.gradient_consistency(tmp_path) == {}
    lines = [
        {"step": 1, "train/loss": 2.0, "stgc/consistency/0": 0.25},
        {"step": 2, "train/loss": 1.0},
        {"step": 3, "stgc/consistency/0": 0.5, "stgc/conflicting/0": "nan"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "stgc/cons'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert summary.gradient_consistency(tmp_path) == {"stgc/consistency/0": {"steps": [1, 3], "values": [0.25, 0.5]}}
