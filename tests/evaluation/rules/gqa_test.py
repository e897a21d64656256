"""GQA against the reference tools' values."""

import pytest

from moe_vlm_jax.evaluation.rules import gqa
from tests.evaluation.rules import golden_cases


@pytest.mark.goldens
def test_gqa_is_read_and_scored_as_the_reference_tools_do(goldens):
    data = golden_cases.load(goldens, "gqa")
    replies = []
    for case in data["cases"]:
        (answer,) = case["answers"]
        assert gqa.parse_gqa(case["prediction"], rule="llava") == case["parsed"], case
        for rule, score in {"llava": case["score"], **case["alt_scores"]}.items():
            assert gqa.gqa_correct(case["prediction"], answer, rule=rule) == score, (rule, case)
        replies.append(
            gqa.GqaReply(
                prediction=case["prediction"],
                answer=answer,
                balanced=case["is_balanced"],
                structural=case["structural"],
                group=None,  # the golden cases do not hold it, so printed_distribution cannot be computed from them
            )
        )
    aggregate = data["aggregate"]
    scores = gqa.gqa_scores(replies, rule="llava")
    assert 0 < scores.count == sum(case["is_balanced"] for case in data["cases"]) < len(data["cases"])
    assert 100 * scores.accuracy == pytest.approx(aggregate["score"], abs=1e-9)
    printed = {"accuracy": scores.accuracy, "binary": scores.binary, "open": scores.open}
    for name, figure in printed.items():
        assert f"{100 * figure:.2f}" == f"{aggregate[f'printed_{name}']:.2f}", name
    for rule in ("lmms_eval", "vlmevalkit"):
        ours = gqa.gqa_scores(replies, rule=rule)
        assert ours.accuracy == pytest.approx(aggregate[f"{rule}_mean_fraction_all"], abs=1e-9)
        assert ours.count == len(replies)


def reply(prediction, answer, group, structural="query"):
    return gqa.GqaReply(prediction=prediction, answer=answer, balanced=True, structural=structural, group=group)


def test_the_distribution_is_the_chi_square_of_each_group_weighted_by_its_size():
    replies = [reply(p, "red", "color") for p in ("Red.", "red", "blue", "green")]
    replies += [reply("blue", "blue", "color"), reply("yes", "no", "place"), reply("yes", "no", None, "verify")]
    # color, five questions: (2-4)^2/4 for red and (2-1)^2/1 for blue, together 2. place, one question: (0-1)^2/1.
    assert gqa.gqa_scores(replies, rule="llava").distribution == pytest.approx((2 * 5 + 1 * 1) / 6 / 100)
    assert gqa.gqa_scores(replies, rule="lmms_eval").distribution is None
    without_group = gqa.gqa_scores([reply("yes", "no", None, "verify")], rule="llava")
    assert without_group.distribution is None and without_group.open is None and without_group.binary == 0.0


def test_no_balanced_question_and_an_unknown_rule_are_errors():
    unbalanced = gqa.GqaReply(prediction="yes", answer="no", balanced=False, structural="verify", group=None)
    with pytest.raises(ValueError, match=r"0 of 1 GQA replies count \(balanced questions only"):
        gqa.gqa_scores([unbalanced], rule="llava")
    assert gqa.gqa_scores([unbalanced], rule="vlmevalkit").count == 1
    with pytest.raises(
        ValueError, match="rule='official' is not known for gqa; use one of llava, vlmevalkit, lmms_eval"
    ):
        gqa.parse_gqa("yes", rule="official")
