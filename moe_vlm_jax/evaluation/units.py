"""Whether a predicted quantity has the unit of the accepted one: "20A" is not "20 mA", and "20mA" is.

Text similarity hardly sees what an engineer sees first. The check annotates answers for people; no score depends on it.
Values are compared as exact fractions in base units, so "0.02 A" is "20 mA" and "68 °F" is "20 °C".
"""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from fractions import Fraction
from typing import Literal, NamedTuple

Verdict = Literal["same", "wrong unit", "wrong value", "no quantity"]


class Unit(NamedTuple):
    """One meaning of a unit: a number of it is factor * number + offset in the base unit of its dimension."""

    dimension: str
    factor: Fraction
    offset: Fraction = Fraction(0)


class Quantity(NamedTuple):
    """A number and every meaning that the unit behind it can have; a number without unit is a count."""

    number: Fraction
    units: Set[Unit]
    has_unit: bool


def check_unit(prediction: str, accepted: Sequence[str]) -> Verdict:
    """Compares the quantities in a prediction with accepted answers.

    An accepted answer takes part if it is a number with a known unit and nothing else (beside it also a bare number, as
    in ["20 mA", "20"]). Of a prediction, which may be a sentence, every quantity takes part, bare numbers only where
    none has a unit, and the verdict is the best of all.

    Upper and lower case matter as they do in the SI (mW, MW); what is only readable in another case is read so ("5 v").
    An ambiguous unit has every meaning: K is kelvin and thousand, F farad and Fahrenheit. "0,5" and "1.000,5" have a
    decimal comma; in "1,500" the comma, which may be either, is the English separator of thousands.

    >>> check_unit("The LED supports 20A", ["20 mA"]), check_unit("20mA", ["20 mA"]), check_unit("30 mA", ["20 mA"])
    ('wrong unit', 'same', 'wrong value')

    Args:
      prediction: of the model.
      accepted: accepted answers.

    Returns:
      'same': the same quantity, whatever it is written in.
      'wrong unit': the accepted number with another unit, or without one.
      'wrong value': neither.
      'no quantity': no accepted answer is a number with a known unit, or no number is in the prediction.
    """
    expected = [quantity for answer in accepted if (quantity := _whole(answer)) is not None]
    found = list(_quantities(prediction))
    found = [quantity for quantity in found if quantity.has_unit] or found
    if not found or not any(quantity.has_unit for quantity in expected):
        return "no quantity"
    pairs = [(mine, theirs) for mine in found for theirs in expected]
    if any(_values(mine) & _values(theirs) for mine, theirs in pairs):
        return "same"
    return "wrong unit" if any(mine.number == theirs.number for mine, theirs in pairs) else "wrong value"


def _values(quantity: Quantity) -> set[tuple[str, Fraction]]:
    """Returns (dimension, value in its base unit) for every meaning."""
    return {(unit.dimension, unit.factor * quantity.number + unit.offset) for unit in quantity.units}


def _whole(text: str) -> Quantity | None:
    """Returns the quantity that a text consists of, or None."""
    match = _QUANTITY.fullmatch(_plain(text).strip().removesuffix("."))
    if match is None or (match["unit"] and not _meanings(match["unit"])):
        return None
    return _quantity(match)


def _quantities(text: str) -> Iterator[Quantity]:
    return (found for match in _QUANTITY.finditer(_plain(text)) if (found := _quantity(match)) is not None)


def _quantity(match: re.Match) -> Quantity | None:
    number, units = _number(match["number"]), _meanings(match["unit"] or "")
    if number is None:
        return None
    return Quantity(-number if match["sign"] in _MINUS else number, units or {_COUNT}, bool(units))


def _plain(text: str) -> str:
    """Returns the text with one sign for micro, ohm and degrees, of which there are several."""
    return _DEGREES.sub(lambda match: "°" + match[1].upper(), text.translate(_SIGNS))


def _number(text: str) -> Fraction | None:
    """Returns the value of digits with points, commas and blanks between them, or None where they make no number."""
    if len(text) > _LONGEST_NUMBER:
        return None
    text = re.sub(r"\s", "", text)
    for thousands, decimal in (",.", ".,"):  # the English way first: it decides "1,500" and "1.500"
        groups = rf"[1-9]\d{{0,2}}(?:\{thousands}\d{{3}})+"
        if re.fullmatch(rf"(?:\d+|{groups})(?:\{decimal}\d+)?", text):
            return Fraction(text.replace(thousands, "").replace(decimal, "."))
    return None


def _meanings(unit: str) -> set[Unit]:
    """Returns what a unit can mean; nothing for an unknown one."""
    above, *below = (_UNITS.get(part) or _IN_ANY_CASE.get(part.lower(), set()) for part in unit.split("/"))
    if not below:
        return above
    # A temperature in a ratio is a difference: where its scale begins does not matter.
    return {Unit(f"{a.dimension}/{b.dimension}", a.factor / b.factor) for a in above for b in below[0]}


_COUNT = Unit("count", Fraction(1))
_LONGEST_NUMBER = 40  # characters; a model may write digits without end, which int() refuses at some thousands
_MINUS = ("-", "\u2212", "\u2013")
_SIGNS = str.maketrans({"\u00b5": "μ", "\u2126": "Ω", "\u212a": "K", "º": "°", "˚": "°", "℃": "°C", "℉": "°F"})
_DEGREES = re.compile(r"(?:°|deg(?:ree)?s?\.?)\s?(C|F)(?:elsius|entigrade|ahrenheit)?\b", re.IGNORECASE)
_NAME = r"(?:[^\W\d_]+|°[CF]?|%)"
# No number inside a word ("R2") or a fraction ("1/2"); the dash of "16-18" is no sign. The number is atomic: where what
# follows does not fit, no part of it does. Behind a unit comes no exponent ("cm2") and no second ratio.
_QUANTITY = re.compile(
    rf"(?<![\w.,/])(?P<sign>[-+\u2212\u2013])?(?P<number>(?>[1-9]\d{{0,2}}(?:\s\d{{3}})+(?!\d)|\d+(?:[.,]\d+)*))(?!/\d)"
    rf"(?:\s*(?P<unit>{_NAME}(?:/{_NAME})?)(?![\w^]|/[^\W\d_]))?"
)

_PREFIXES = (
    ("p", "pico", -12),
    ("n", "nano", -9),
    ("μ", "micro", -6),
    ("u", "micro", -6),
    ("m", "milli", -3),
    ("", "", 0),
    ("k", "kilo", 3),
    ("K", "kilo", 3),
    ("M", "mega", 6),
    ("G", "giga", 9),
    ("T", "tera", 12),
)
# Units that take prefixes: the symbol, which is also the dimension, and names.
_SI = (
    *("A ampere amp", "V volt", "W watt", "Ω ohm", "F farad", "H henry", "Hz hertz", "J joule", "Wh watthour", "Ah"),
    *("N newton", "Pa pascal", "m meter metre", "g gram", "s second sec", "l liter litre", "lm lumen", "lx lux"),
    *("cd candela", "b bit"),
)
# Units that take none: symbols and names, dimension, factor.
_OTHERS = (
    ("% percent", "%", "1"),
    ("° degree", "degree", "1"),
    ("dB decibel", "dB", "1"),
    ("rpm", "rpm", "1"),
    ("cm centimeter centimetre", "m", "0.01"),
    ("t tonne", "g", "1e6"),
    ("L", "l", "1"),
    ("mL", "l", "0.001"),
    ("min minute", "s", "60"),
    ("h hr hour", "s", "3600"),
    ("day", "s", "86400"),
    ("week", "s", "604800"),
    ("month", "month", "1"),
    ("year yr", "month", "12"),
    ("k K thousand", "count", "1e3"),
    ("M million", "count", "1e6"),
    ("bn billion", "count", "1e9"),
    ("B byte", "b", "8"),
    ("kB KB kilobyte", "b", "8e3"),
    ("MB megabyte", "b", "8e6"),
    ("GB gigabyte", "b", "8e9"),
    ("TB terabyte", "b", "8e12"),
    ("KiB", "b", "8192"),
    ("MiB", "b", "8388608"),
    ("GiB", "b", "8589934592"),
    ("bps", "b/s", "1"),
    ("kbps Kbps", "b/s", "1e3"),
    ("Mbps", "b/s", "1e6"),
    ("Gbps", "b/s", "1e9"),
)
_TEMPERATURES = (
    ("°C C celsius ° degree", Unit("temperature", Fraction(1))),
    ("°F F fahrenheit ° degree", Unit("temperature", Fraction(5, 9), Fraction(-160, 9))),
    ("K kelvin", Unit("temperature", Fraction(1), Fraction("-273.15"))),
)


def _table() -> dict[str, set[Unit]]:
    """Returns every symbol and name, plurals too, with what it can mean."""
    table: dict[str, set[Unit]] = collections.defaultdict(set)

    def add(names: Iterable[str], unit: Unit) -> None:
        for name in names:
            table[name].add(unit)
            if len(name) > 2:
                table[name + "s"].add(unit)

    for prefix, prefix_name, power in _PREFIXES:
        for symbol, *names in map(str.split, _SI):
            if symbol != "b" or power >= 0:  # "5 mb" is no thousandth of a bit
                named = (written + name for name in names for written in (prefix, prefix_name))  # kohm, kiloohm
                add([prefix + symbol, *named], Unit(symbol, Fraction(10) ** power))
    for names, dimension, factor in _OTHERS:
        add(names.split(), Unit(dimension, Fraction(factor)))
    for names, unit in _TEMPERATURES:
        add(names.split(), unit)
    return dict(table)


def _in_any_case(table: Mapping[str, set[Unit]]) -> dict[str, set[Unit]]:
    """Returns the table by names in lower case; what differs in case alone is ambiguous there."""
    merged: dict[str, set[Unit]] = collections.defaultdict(set)
    for name, units in table.items():
        merged[name.lower()] |= units
    return dict(merged)


_UNITS = _table()
_IN_ANY_CASE = _in_any_case(_UNITS)
