"""Units of predicted quantities: the report's LED data sheet (figure 5), conversions, and what is no quantity."""

from fractions import Fraction

import pytest

from moe_vlm_jax.evaluation import units

LED = {
    "The LED is designed to support a maximum forward current of 20A": "wrong unit",
    "The LED can support a maximum forward current of 20 mA.": "same",
    "20mA": "same",
}


@pytest.mark.parametrize(("prediction", "verdict"), LED.items())
def test_the_three_answers_of_the_reports_figure_5(prediction, verdict):
    assert units.check_unit(prediction, ["20 mA"]) == verdict


SAME = [
    ("20 mA", "20mA"),
    ("20\u00a0mA", "20 mA"),  # no-break space
    ("20\u202fmA.", "20 mA"),  # narrow no-break space
    ("20.0 mA", "20 mA"),
    ("20 mA", "20 mA."),
    ("0.02 A", "20 mA"),
    ("0,02 A", "20 mA"),
    ("20 milliamps", "20 mA"),
    ("20 ma", "20 mA"),  # readable in another case only
    ("20,000 µA", "20 mA"),  # micro sign
    ("10 μA", "10 uA"),  # Greek mu; the data sheet's own "uA"
    ("10 µA", "10 microamperes"),
    ("4.7 kΩ", "4.7 KΩ"),
    ("4.7 k\u2126", "4700 ohm"),  # ohm sign
    ("4,7 kohms", "4.7 kΩ"),
    ("20k", "20 K"),
    ("20k", "20 thousand"),
    ("20,000", "20k"),
    ("1,500,000", "1.5 million"),
    ("300 K", "26.85 °C"),
    ("85 °C", "85°C"),
    ("85 ºC", "85 ˚C"),  # ordinal sign, ring above
    ("85 ℃", "85 °C"),
    ("85 degrees Celsius", "85 °C"),
    ("85 deg. c", "85 °C"),
    ("85 C", "85 °C"),
    ("85°", "85 °C"),
    ("68 °F", "20 °C"),
    ("98.6 F", "37 °C"),
    ("-40 °F", "-40 °C"),
    ("\u221240 °C", "-40 °C"),  # minus sign
    ("12%", "12 %"),
    ("12 percent", "12%"),
    ("12,5 %", "12.5%"),
    ("1.000,5 W", "1,000.5 W"),
    ("10 000 Ω", "10 kΩ"),
    ("1,5 GB", "1500 MB"),
    ("8 Mb", "1 MB"),
    ("5 mb", "5 MB"),
    ("100 Mbps", "100 Mb/s"),
    ("2 °C/W", "2 K/W"),
    ("3.6 km/h", "1 m/s"),
    ("90 s", "1.5 minutes"),
    ("2 years", "24 months"),
]


@pytest.mark.parametrize(("prediction", "accepted"), SAME)
def test_one_quantity_in_two_ways_of_writing_is_the_same(prediction, accepted):
    assert units.check_unit(prediction, [accepted]) == "same"


WRONG_UNIT = [
    ("20 A", "20 mA"),
    ("20", "20 mA"),  # none
    ("20 V", "20 mA"),
    ("20 zA", "20 mA"),  # unknown
    ("20 MW", "20 mW"),
    ("20 mW", "20 MW"),
    ("20 kb", "20 kB"),
    ("12", "12%"),
    ("2.5 million", "2.5 billion"),
    ("100 K", "100 °C"),
    ("100 °F", "100 °C"),
    ("5 months", "5 years"),
    ("20 mA/V", "20 mA"),
    ("5 M\u2126", "5 mΩ"),  # ohm sign
    ("20 cm2", "20 cm"),
    ("20 m^2", "20 m"),
    ("20 m/s/s", "20 m/s"),
]


@pytest.mark.parametrize(("prediction", "accepted"), WRONG_UNIT)
def test_the_accepted_number_with_another_unit_is_flagged(prediction, accepted):
    assert units.check_unit(prediction, [accepted]) == "wrong unit"


WRONG_VALUE = [
    ("30 mA", "20 mA"),
    ("30 V", "20 mA"),
    ("-20 mA", "20 mA"),
    ("0.2 A", "20 mA"),
    ("20,000 mA", "20 mA"),
    ("1,5 W", "15 W"),
    ("the 20 LEDs need 30 mA", "20 mA"),  # the bare number counts only where no number has a unit
    ("12 V, 3 A", "20 mA"),
]


@pytest.mark.parametrize(("prediction", "accepted"), WRONG_VALUE)
def test_another_number_is_a_wrong_value(prediction, accepted):
    assert units.check_unit(prediction, [accepted]) == "wrong value"


NO_QUANTITY = [
    ("20 mA", ["20"]),  # the accepted answer names no unit
    ("20 mA", ["2019", "nineteen"]),
    ("twenty", ["20 mA"]),
    ("", ["20 mA"]),
    ("R2", ["2 V"]),
    ("1/2 V", ["2 V"]),
    ("12/5 V", ["1 V"]),
    ("1.2.3 V", ["1.2 V"]),
    ("12,34,56 V", ["12 V"]),
    ("1" * 5000 + " V", ["1 V"]),
    ("20 mA", ["16-18 mA"]),  # a range
    ("20 mA", ["about 20 mA"]),
    ("20 mA", ["20 zA"]),
    ("20 mA", []),
]


@pytest.mark.parametrize(("prediction", "accepted"), NO_QUANTITY)
def test_what_cannot_be_compared_is_not_judged(prediction, accepted):
    assert units.check_unit(prediction, accepted) == "no quantity"


def test_a_sentence_with_several_quantities_gets_the_best_verdict():
    assert units.check_unit("20 mA at 5 V", ["20 mA"]) == "same"
    assert units.check_unit("at 5 V, 20 A", ["20 mA"]) == "wrong unit"
    assert units.check_unit("16-18 mA", ["18 mA"]) == "same"  # the dash is no minus
    assert units.check_unit("20 A", ["20 V", "20 A"]) == "same"


def test_a_bare_number_is_right_where_it_is_accepted_beside_one_with_a_unit():
    assert units.check_unit("20", ["20 mA", "20"]) == "same"
    assert units.check_unit("20 A", ["20 mA", "20"]) == "wrong unit"
    assert units.check_unit("30", ["20 mA", "20"]) == "wrong value"
    assert units.check_unit("30", ["20 mA", "30 zA"]) == "wrong value"  # an unknown unit is none that may be left out


NUMBERS = {
    "7": 7,
    "0,5": Fraction(1, 2),
    "0.5": Fraction(1, 2),
    "0,500": Fraction(1, 2),  # no group of thousands begins with 0
    "1,500": 1500,  # English, though it may be either
    "1.500": Fraction(3, 2),
    "1,500,000": 1500000,
    "1.500.000": 1500000,
    "1.500,25": Fraction(6001, 4),
    "1,500.25": Fraction(6001, 4),
    "12,5": Fraction(25, 2),
    "1234,5": Fraction(2469, 2),
    "1,5000": Fraction(3, 2),
    "1 500 000": 1500000,
    "1.2.3": None,
    "1,500,00": None,
    "1,50.0": None,
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_with_points_and_commas(text, value):
    assert units._number(text) == value
