"""Matching replies to options against the reference tools' values."""

import pytest

from moe_vlm_jax.evaluation.rules import choices, option_matching
from tests.evaluation.rules import golden_cases


@pytest.mark.goldens
def test_matched_options_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "mmbench_match")
    others = {
        "vlmevalkit_with_env_VERBOSE_set": option_matching.match_vlmevalkit_verbose,
        "lmms_eval_MMBench_Evaluator.can_infer": option_matching.match_lmms,
        "lmms_eval_extract_mcq_answer": lambda reply, options: option_matching.extract_static(reply, sorted(options)),
    }
    right, unmatched, differing = 0, 0, dict.fromkeys(others, 0)
    for case in data["cases"]:
        reply, options = case["prediction"], case["choices"]
        letter = option_matching.match_vlmevalkit(reply, options)
        assert letter == choices.match_option(reply, options, rule="vlmevalkit") == case["parsed"], case
        assert float([letter] == case["answers"]) == case["score"], case
        right += letter in case["answers"]
        unmatched += letter is None
        assert case["alt_parsed"].keys() == others.keys()
        for name, expected in case["alt_parsed"].items():
            assert others[name](reply, options) == expected, (name, case)
            differing[name] += expected != letter
        lmms = case["alt_parsed"]["lmms_eval_MMBench_Evaluator.can_infer"]
        assert choices.match_option(reply, options, rule="lmms_eval") == lmms, case
    assert 100 * right / data["n_cases"] == pytest.approx(data["aggregate"]["score"], abs=1e-9)
    assert unmatched == data["aggregate"]["n_unmatched"]
    assert differing == data["aggregate"]["n_differs"]


OPTIONS = {"A": "two", "B": "twenty", "C": "Dutch"}  # 14 characters


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("choose A out of all these", None),  # the fifth word from the end
        ("choose A out of these", "A"),
        ("the correct  answer is **c**", "C"),
        ("the answer is Dutch", "C"),  # by its text: D is no option
        ("the answer is Belgian beer", "B"),  # by the first letter of a word
        ("A is Z", "A"),
        ("it is Z", "Z"),
        ("it is TWENTY" + " " * 16, "B"),
        ("it is TWENTY" + " " * 17, None),
        ("Cannot determine the answer: A", "Z"),
        ("Cannot determine the answer. Failed to obtain answer via API: A", None),
    ],
)
def test_a_letter_counts_among_the_last_words_and_a_text_in_a_short_reply(reply, letter):
    assert option_matching.match_vlmevalkit(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("A is the one", None),
        ("A. is the one", "A"),
        ("A. is it, or B, perhaps", "A"),  # "A." comes before "B,"
        (":B).", "B"),
        ("[B]", None),
        ("E", "E"),
        ("F", None),
        ("two or twenty", None),
        ("Failed to obtain answer via API B", None),
    ],
)
def test_lmms_evals_matcher_knows_its_forms_and_five_letters(reply, letter):
    assert option_matching.match_lmms(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A, B or C", "A"),  # the start before the end
        ("it is (A), B. or C", "C"),  # the end before all else
        ("(A) no. My choice is B or so", "B"),  # a phrase before a form, but "(A)" is no start
        ("see (A) (B) B. here", "B"),
        ("see B. (A) here", "A"),
        ("see C: and B) here", "C"),
        ("see B here", "B"),
        ("BAC no", "C"),  # within a word, the last
        ("答案是B吗", "B"),
        ("", None),
        (" .,", None),
        ("d", None),
    ],
)
def test_the_static_reader_takes_the_surest_form_and_of_it_the_last(reply, letter):
    assert option_matching.extract_static(reply, "ABCD") == letter
