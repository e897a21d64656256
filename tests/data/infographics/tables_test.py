import csv
import json
import subprocess
import sys

import pytest

from moe_vlm_jax.data.infographics import tables, vega


def table(name: str) -> tables.Table:
    return next(table for table in tables.load_tables() if table.name == name)


def test_there_are_dozens_of_small_tables_with_unit_title_and_source():
    loaded = tables.load_tables()
    assert len(loaded) >= 100
    assert len({table.dataset for table in loaded}) >= 14
    for one in loaded:
        assert 2 <= len(one.labels) <= 12, one.name
        assert 1 <= len(one.series) <= 5, one.name
        assert one.title and one.source and one.measure and one.label_noun, one.name
        assert len(one.title) <= 70 and not one.title.endswith("."), one.title
        assert bool(one.series_noun) == (len(one.series) > 1), one.name
    assert len({(one.title, one.measure) for one in loaded}) == len(loaded), "a title must name one table"


def test_loading_imports_no_pandas_and_is_the_same_in_another_process():
    code = (
        "import sys; from moe_vlm_jax.data.infographics import tables; t = tables.load_tables(); "
        "assert 'pandas' not in sys.modules and 'jax' not in sys.modules; print([(x.name, dict(x.series)) for x in t])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([(one.name, dict(one.series)) for one in tables.load_tables()])


def test_numbers_are_the_ones_in_the_files():
    with (vega.folder() / "iowa-electricity.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row[0].startswith("2017")]
    assert list(table("iowa-electricity/sources 2017").series["Generation"]) == [float(row[2]) for row in rows]
    with (vega.folder() / "airports.csv").open(encoding="utf-8") as file:
        texas = sum(row["state"] == "TX" for row in csv.DictReader(file))
    south = table("airports/the South")
    assert south.series["Airports"][south.labels.index("Texas")] == texas == 209
    wheat = {row["year"]: row["wheat"] for row in json.loads((vega.folder() / "wheat.json").read_text("utf-8"))}
    prices = table("wheat/prices 1765-1810")
    assert [wheat[year] for year in prices.labels] == list(prices.series["Wheat"])


def test_averages_are_the_ones_worked_by_hand():
    # stocks.csv, MSFT in 2001: the twelve monthly closing prices.
    months = [24.84, 24.0, 22.25, 27.56, 28.14, 29.7, 26.93, 23.21, 20.82, 23.65, 26.12, 26.95]
    two_thousand_one = table("stocks/companies 2001")
    assert two_thousand_one.series["Price"][two_thousand_one.labels.index("Microsoft")] == round(sum(months) / 12, 2)
    with (vega.folder() / "us-employment.csv").open(encoding="utf-8") as file:
        thousands = [int(row["government"]) for row in csv.DictReader(file) if row["month"].startswith("2010")]
    jobs = table("us-employment/sectors 2010")
    assert len(thousands) == 12
    assert jobs.series["Jobs"][jobs.labels.index("Government")] == round(sum(thousands) / 12_000, 1)
    # Fisher's published means of Iris setosa.
    iris = table("iris/all")
    assert [iris.series[name][0] for name in iris.series] == [5.01, 3.43, 1.46, 0.25]


def test_a_table_with_a_missing_value_is_refused():
    good = table("iris/all")
    fields = {field: getattr(good, field) for field in good.__dataclass_fields__}
    with pytest.raises(ValueError, match="values in 'Short' for 3 labels"):
        tables.Table(**{**fields, "series": {"Short": (1.0, 2.0)}})
    with pytest.raises(ValueError, match=">= 0 with 2 decimals"):
        tables.Table(**{**fields, "series": {"Fine": (1.0, 2.001, 3.0)}})
