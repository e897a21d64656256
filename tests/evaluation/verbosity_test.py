"""Words per answer and echoes of the question, counted by hand."""

import pytest

from moe_vlm_jax.evaluation import verbosity

LED = "What is the maximum forward current of the LED?"


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("", 0),
        (" \n", 0),
        ("20mA", 1),
        ("20 mA", 2),
        ("The LED can support a maximum forward current of 20 mA.", 11),
        ("a\tb\u00a0c  d", 4),
    ],
)
def test_words_are_what_white_space_separates(answer, count):
    assert verbosity.num_words(answer) == count


ECHOES = {
    # The report's figure 5: both sentences hold "maximum forward current of", the short answer nothing of it.
    "baseline of figure 5": ("The LED is designed to support a maximum forward current of 20A", LED, ["20 mA"], True),
    "SFT of figure 5": ("The LED can support a maximum forward current of 20 mA.", LED, ["20 mA"], True),
    "DPO of figure 5": ("20mA", LED, ["20 mA"], False),
    "one word shared": ("the current", LED, ["20 mA"], False),
    "two words shared": ("Forward current: 20 mA", LED, ["20 mA"], False),
    "three words that are not consecutive": ("maximum current of forward", LED, ["20 mA"], False),
    "three words in another order": ("current forward maximum", LED, ["20 mA"], False),
    "case, punctuation and white space": ("MAXIMUM,  \n(forward) 'current'!", LED, ["20 mA"], True),
    "the last words, without the mark": ("of the LED", LED, ["20 mA"], True),
    "the whole question": (LED, LED, ["20 mA"], True),
    "nothing": ("", LED, ["20 mA"], False),
    "all of a question of two words": ("The total height is 5", "Total height?", ["5"], True),
    "half of a question of two words": ("total: 5", "Total height?", ["5"], False),
    "a question of one word": ("year 2011", "Year?", ["2011"], True),
    "a part of that word": ("yearly", "Year?", ["2011"], False),
    "a question without a word": ("?", "?", [], False),
    "a dash is no word": ("the maximum current", "What is the maximum - current?", ["5"], True),
    "a right option": ("New York City", "Which is larger, New York City or Boston?", ["New York City"], False),
    "a longer right answer": (
        "New York City Marathon",
        "What is held in New York City?",
        ["none", "the new york city marathon"],
        False,
    ),
    "a right option in a sentence that repeats": (
        "New York City is larger, New York",
        "Which is larger, New York City or Boston?",
        ["New York City"],
        True,
    ),
    "a wrong option, which looks like an echo": ("New York City", "Which, New York City or Oslo?", ["Oslo"], True),
    "numbers are words too": ("5.5 to 7", "Which is right, 5.5 to 7?", ["8"], True),
    "signs inside a word stay": ("the x-axis label", "What is the x axis label?", ["t"], False),
}


@pytest.mark.parametrize(("answer", "question", "accepted", "expected"), ECHOES.values(), ids=ECHOES.keys())
def test_an_echo_is_three_consecutive_words_that_no_accepted_answer_holds(answer, question, accepted, expected):
    assert verbosity.echoes(answer, question, accepted) is expected


def test_rates_are_means_over_answers():
    texts = ["20mA", "", "maximum forward current of 20 mA", "it is 20"]
    rows = [{"question": LED, "answers": ["20 mA"], "prediction": text} for text in texts]
    assert verbosity.mean_words(rows) == (1 + 0 + 6 + 3) / 4
    assert verbosity.echo_rate(rows) == 0.25
    assert verbosity.echo_rate(iter(rows[:1])) == 0.0
