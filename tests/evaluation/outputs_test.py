"""The files and the table that an evaluation leaves behind."""

import json

from moe_vlm_jax.evaluation import outputs, scorers


def scores(exact: float, similarity: float, **per_type: tuple[float, float, int]) -> scorers.Scores:
    of_type = {k.replace("_", "-"): scorers.Scores(*v) for k, v in per_type.items()}
    return scorers.Scores(exact_match=exact, anls=similarity, count=120, per_type=of_type)


RESULTS = {
    "before": scores(0.0, 0.02, image_span=(0.0, 0.03, 80), multi_span=(0.0, 0.0, 40)),
    "after": scores(0.7166, 0.8, image_span=(0.8, 0.85, 80), multi_span=(0.55, 0.7, 40)),
    "blind": scores(0.25, 0.3, image_span=(0.2, 0.25, 80), multi_span=(0.35, 0.4, 40)),
}


def test_the_console_table_shows_every_column_side_by_side_overall_and_for_each_type():
    lines = outputs.console_table(RESULTS).splitlines()
    assert lines[0].split() == ["questions", "before", "after", "blind"]
    assert [line.split() for line in lines[1:5]] == [
        ["exact", "match"],
        ["all", "120", "0.000", "0.717", "0.250"],
        ["image-span", "80", "0.000", "0.800", "0.200"],
        ["multi-span", "40", "0.000", "0.550", "0.350"],
    ]
    assert lines[6].split() == ["all", "120", "0.020", "0.800", "0.300"]
    ends = {len(line) for line in lines if len(line.split()) > 2}
    assert len(ends) == 1  # the numbers stand in columns


def test_a_control_that_lacks_a_type_shows_a_dash():
    partial = {**RESULTS, "shuffled": scores(0.1, 0.2, image_span=(0.1, 0.2, 80))}
    rows = {row[0]: row for row in map(str.split, outputs.console_table(partial).splitlines()[:6])}
    assert rows["multi-span"][-1] == "-"
    assert rows["image-span"][-1] == "0.100"


def test_results_and_predictions_are_json_that_holds_what_was_given(tmp_path):
    outputs.write_results(tmp_path / "results.json", RESULTS)
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == ["before", "after", "blind"]
    assert written["after"]["exact_match"] == 0.7166
    assert written["after"]["per_type"]["image-span"] == {"exact_match": 0.8, "anls": 0.85, "count": 80}

    # Only a line feed ends a line: a model may write any other character.
    rows = [
        {"id": "a", "prediction": "Zürich\n"},
        {"id": "b", "prediction": ""},
        {"id": "c", "prediction": "\x85\u2028\r"},
    ]
    outputs.write_predictions(tmp_path / "predictions.jsonl", rows)
    assert outputs.read_predictions(tmp_path / "predictions.jsonl") == rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.jsonl", "results.json"]
