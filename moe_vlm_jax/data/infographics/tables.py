"""Small real tables with labels, units and sources, read from the PyPI package vega_datasets.

Only the files inside the wheel are read, with the standard library: importing the package would import pandas.
Every number is the file's own, or a count, mean or sum of its rows; nothing is invented. Left out: anscombe (made-up
numbers), la-riots (single deaths) and burtin's concentrations (they span six orders of magnitude).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from moe_vlm_jax.data.infographics import vega

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers for each label, in one or more series.

    Values are rounded to `decimals`, so what is printed is exactly what is asked about. No value is negative, no two
    labels are equal, and every series has one value for each label.

    Attributes:
      dataset: the file it comes from. Two tables of one dataset may show the same numbers: split by this.
      name: unique among all tables.
      title: without a trailing stop, at most 70 characters.
      source: who published the numbers.
      measure: what a value is, as it stands in a sentence ("average high temperature").
      unit: "" for plain counts.
      decimals: digits after the point.
      label_noun: what a label is ("month").
      series_noun: what a series is ("company"); "" when there is only one.
      ordered: labels are in time or size order, so a line chart is honest.
      additive: labels are disjoint parts, so sums and shares mean something.
      labels: in the order of the source.
      series: name -> one value for each label.
    """

    dataset: str
    name: str
    title: str
    source: str
    measure: str
    unit: str
    decimals: int
    label_noun: str
    series_noun: str
    ordered: bool
    additive: bool
    labels: tuple[str, ...]
    series: Mapping[str, tuple[float, ...]] = dataclasses.field(hash=False)

    def __post_init__(self):
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise ValueError(f"{self.name}: labels={self.labels} must be two or more, all different.")
        for name, values in self.series.items():
            if len(values) != len(self.labels):
                raise ValueError(f"{self.name}: {len(values)} values in {name!r} for {len(self.labels)} labels.")
            if min(values) < 0 or any(round(value, self.decimals) != value for value in values):
                raise ValueError(f"{self.name}: {name!r}={values} must be >= 0 with {self.decimals} decimals.")


@functools.cache
def load_tables() -> tuple[Table, ...]:
    """All tables, always in the same order."""
    first = (_airports, _barley, _burtin, _cars, _crimea, _driving, _iowa)
    second = (_iris, _vix, _temperatures, _weather, _stocks, _employment, _wheat)
    tables = tuple(table for make in first + second for table in make())
    if len({table.name for table in tables}) != len(tables):
        raise ValueError("two tables have the same name; names must be unique.")
    return tables


def _maker(dataset: str, source: str) -> Callable[..., Table]:
    def make(
        name: str,
        title: str,
        measure: str,
        unit: str,
        decimals: int,
        label_noun: str,
        labels: Sequence[str],
        series: Mapping[str, Iterable[float]],
        *,
        series_noun: str = "",
        ordered: bool = False,
        additive: bool = False,
    ) -> Table:
        rounded = {key: tuple(round(float(value), decimals) for value in values) for key, values in series.items()}
        return Table(
            dataset,
            f"{dataset}/{name}",
            title,
            source,
            measure,
            unit,
            decimals,
            label_noun,
            series_noun if len(rounded) > 1 else "",
            ordered,
            additive,
            tuple(labels),
            rounded,
        )

    return make


_REGIONS = {
    "New England": "CT Connecticut, ME Maine, MA Massachusetts, NH New Hampshire, RI Rhode Island, VT Vermont",
    "the Midwest": "IL Illinois, IN Indiana, IA Iowa, KS Kansas, MI Michigan, MN Minnesota, OH Ohio, WI Wisconsin",
    "the South": "AL Alabama, AR Arkansas, FL Florida, GA Georgia, KY Kentucky, TN Tennessee, TX Texas, VA Virginia",
    "the West": "AK Alaska, AZ Arizona, CA California, CO Colorado, ID Idaho, NV Nevada, OR Oregon, UT Utah",
}


def _airports() -> Iterable[Table]:
    make = _maker("airports", "OurAirports")
    counts = vega.group(vega.read_csv("airports.csv"), lambda row: row["state"], lambda row: 1)
    for region, listed in _REGIONS.items():
        states = dict(entry.split(" ", 1) for entry in listed.split(", "))
        series = {"Airports": [len(counts[code]) for code in states]}
        title = f"Airports in {region}, United States"
        yield make(region, title, "number of airports", "", 0, "state", tuple(states.values()), series, additive=True)


def _barley() -> Iterable[Table]:
    make = _maker("barley", "Immer, Hayes and Powers (1934)")
    rows = vega.read_json("barley.json")
    unit = "bushels/acre"
    for axis, other, noun in (("site", "variety", "variety"), ("variety", "site", "site")):
        for place, members in vega.group(rows, lambda row: row[axis], lambda row: row).items():  # noqa: B023
            labels = list(dict.fromkeys(row[other] for row in members))
            cells = {(row["year"], row[other]): row["yield"] for row in members}
            series = {str(year): [cells[year, label] for label in labels] for year in (1931, 1932)}
            title = f"Barley yields at {place}" if axis == "site" else f"Yields of the barley variety {place}"
            name = f"{axis} {place}"
            yield make(name, title, "barley yield", unit, 1, noun, labels, series, series_noun="year")
    for year in (1931, 1932):
        sites = vega.group(
            (row for row in rows if row["year"] == year), lambda row: row["site"], lambda row: row["yield"]
        )
        values = [vega.mean(yields) for yields in sites.values()]
        title = f"Average barley yield of ten varieties, {year}"
        yield make(f"sites {year}", title, "average barley yield", unit, 1, "site", list(sites), {"Yield": values})


def _burtin() -> Iterable[Table]:
    make = _maker("burtin", "Will Burtin (1951)")
    for column, noun, title in (
        ("Genus", "genus", "Bacteria tested with three antibiotics, by genus"),
        ("Gram_Staining", "Gram stain", "Bacteria tested with three antibiotics, by stain"),
    ):
        counts = vega.group(vega.read_json("burtin.json"), lambda row: row[column], lambda row: 1)  # noqa: B023
        labels = [key.capitalize() for key in counts]
        series = {"Bacteria": [len(ones) for ones in counts.values()]}
        yield make(noun, title, "number of bacteria", "", 0, noun, labels, series, additive=True)


_MISSPELT = {"chevroelt": "chevrolet", "chevy": "chevrolet", "maxda": "mazda", "toyouta": "toyota"}
_MISSPELT |= {"vokswagen": "volkswagen", "vw": "volkswagen", "mercedes": "mercedes-benz"}
_CAR_COLUMNS = {
    "Miles_per_Gallon": ("fuel economy", "mpg", 1),
    "Horsepower": ("engine power", "hp", 0),
    "Weight_in_lbs": ("weight", "lb", 0),
    "Acceleration": ("time to 60 mph", "s", 1),
}


def _cars() -> Iterable[Table]:
    make = _maker("cars", "Donoho and Ramos (1982)")
    rows = vega.read_json("cars.json")
    origins = ("USA", "Europe", "Japan")
    brands = vega.group(
        rows, lambda row: _MISSPELT.get(row["Name"].split()[0], row["Name"].split()[0]), lambda row: row
    )
    for origin in origins:
        chosen = {
            "AMC" if brand == "amc" else brand.title(): members
            for brand, members in brands.items()
            if members[0]["Origin"] == origin and len(members) >= 4
        }
        place = {"USA": "American"}.get(origin, f"{origin}an" if origin == "Europe" else "Japanese")
        series = {"Models": [len(members) for members in chosen.values()]}
        title = f"{place} car models of 1970-1982, by make"
        yield make(f"models {origin}", title, "number of models", "", 0, "make", list(chosen), series, additive=True)
        for column, (measure, unit, decimals) in _CAR_COLUMNS.items():
            values = [vega.mean(row[column] for row in members if row[column]) for members in chosen.values()]
            title = f"Average {measure} of {place} cars, 1970-1982"
            name, measure = f"{column} {origin}", f"average {measure}"
            yield make(name, title, measure, unit, decimals, "make", list(chosen), {measure.capitalize(): values})
    years = sorted({row["Year"] for row in rows})
    labels = [year[:4] for year in years]
    for column, (measure, unit, decimals) in _CAR_COLUMNS.items():
        cells = vega.group(rows, lambda row: (row["Year"], row["Origin"]), lambda row: row)
        series = {
            origin: [vega.mean(row[column] for row in cells[year, origin] if row[column]) for year in years]
            for origin in origins
        }
        title, measure = f"Average {measure} of cars, by origin", f"average {measure}"
        name = f"{column} by year"
        yield make(name, title, measure, unit, decimals, "year", labels, series, series_noun="origin", ordered=True)
    by_cylinders = vega.group(rows, lambda row: row["Cylinders"], lambda row: 1)
    counts = {f"{n} cylinders": len(by_cylinders[n]) for n in sorted(by_cylinders)}
    title, series = "Car models of 1970-1982, by engine", {"Models": counts.values()}
    yield make("cylinders", title, "number of models", "", 0, "engine", list(counts), series, additive=True)


def _crimea() -> Iterable[Table]:
    make = _maker("crimea", "Florence Nightingale (1858)")
    causes = {"wounds": "Wounds", "disease": "Disease", "other": "Other causes"}
    rows = vega.read_json("crimea.json")
    for year, members in vega.group(rows, lambda row: row["date"][:4], lambda row: row).items():
        labels = [MONTHS[int(row["date"][5:7]) - 1] for row in members]
        series = {name: [row[column] for row in members] for column, name in causes.items()}
        title, measure = f"Casualties of the Crimean War, {year}", "number of casualties"
        flags = {"series_noun": "cause", "ordered": True, "additive": True}
        yield make(f"months {year}", title, measure, "", 0, "month", labels, series, **flags)
        totals = {"Casualties": [sum(values) for values in series.values()]}
        title = f"Casualties of the Crimean War by cause, {year}"
        yield make(f"causes {year}", title, measure, "", 0, "cause", tuple(causes.values()), totals, additive=True)


def _driving() -> Iterable[Table]:
    make = _maker("driving", "New York Times (2010)")
    rows = {row["year"]: row for row in vega.read_json("driving.json")}
    for column, title, measure, unit, decimals in (
        ("miles", "Miles driven per person in the United States", "miles driven per person", "miles", 0),
        ("gas", "Price of gasoline in the United States", "price of gasoline", "$/gallon", 2),
    ):
        for start, stop, step in ((1956, 1971, 2), (1971, 1986, 2), (1986, 2001, 2), (2001, 2011, 1), (1960, 2011, 10)):
            years = range(start, stop, step)
            series = {measure.capitalize(): [rows[year][column] for year in years]}
            heading = f"{title}, {years[0]}-{years[-1]}"
            labels = [str(year) for year in years]
            yield make(
                f"{column} {start}/{step}", heading, measure, unit, decimals, "year", labels, series, ordered=True
            )


def _iowa() -> Iterable[Table]:
    make = _maker("iowa-electricity", "U.S. Energy Information Administration")
    measure, unit = "electricity generated", "GWh"
    rows = vega.group(vega.read_csv("iowa-electricity.csv"), lambda row: row["source"], lambda row: row)
    cells = {name: {row["year"][:4]: int(row["net_generation"]) for row in members} for name, members in rows.items()}
    years = tuple(cells["Renewables"])
    for start in range(0, len(years), 6):
        labels = years[start : start + 6]
        series = {name: [values[year] for year in labels] for name, values in cells.items()}
        title = f"Electricity in Iowa by source, {labels[0]}-{labels[-1]}"
        flags = {"series_noun": "energy source", "ordered": True, "additive": True}
        yield make(f"years {labels[0]}", title, measure, unit, 0, "year", labels, series, **flags)
    for year in years:
        series = {"Generation": [values[year] for values in cells.values()]}
        title = f"Electricity generated in Iowa, {year}"
        yield make(f"sources {year}", title, measure, unit, 0, "energy source", tuple(cells), series, additive=True)


def _iris() -> Iterable[Table]:
    make = _maker("iris", "R. A. Fisher (1936)")
    parts = (("sepal", "Length"), ("sepal", "Width"), ("petal", "Length"), ("petal", "Width"))
    columns = {part + side: f"{part.capitalize()} {side.lower()}" for part, side in parts}
    groups = vega.group(vega.read_json("iris.json"), lambda row: f"Iris {row['species']}", lambda row: row)
    means = {
        name: [vega.mean(row[column] for row in rows) for rows in groups.values()] for column, name in columns.items()
    }
    title, measure = "Average size of iris flowers", "average size"
    yield make("all", title, measure, "cm", 2, "species", tuple(groups), means, series_noun="measurement")
    for name, values in means.items():
        title, measure = f"{name} of iris flowers", f"average {name.lower()}"
        yield make(name, title, measure, "cm", 2, "species", tuple(groups), {name: values})


def _vix() -> Iterable[Table]:
    make = _maker("ohlc", "Chicago Board Options Exchange")
    rows = vega.read_json("ohlc.json")
    for start in range(0, len(rows) - 5, 6):
        chosen = rows[start : start + 6]
        labels = [f"{MONTHS[int(row['date'][5:7]) - 1]} {int(row['date'][8:])}" for row in chosen]
        series = {"Opening": [row["open"] for row in chosen], "Closing": [row["close"] for row in chosen]}
        title = f"Volatility Index (VIX), {labels[0]} to {labels[-1]}, 2009"
        flags = {"series_noun": "time of day", "ordered": True}
        yield make(f"days {start}", title, "VIX value", "points", 2, "day", labels, series, **flags)


def _temperatures() -> Iterable[Table]:
    hours = {"12 am": 0, "4 am": 4, "8 am": 8, "12 pm": 12, "4 pm": 16, "8 pm": 20}
    for dataset, city in (("seattle-temps", "Seattle"), ("sf-temps", "San Francisco")):
        make = _maker(dataset, "National Oceanic and Atmospheric Administration")
        rows = [(row["date"], float(row["temp"])) for row in vega.read_csv(f"{dataset}.csv")]  # 2010/01/31 23:00
        unit, measure = "°F", "average temperature"
        by_month = vega.group(rows, lambda row: int(row[0][5:7]), lambda row: row[1])
        series = {"Temperature": [vega.mean(by_month[month]) for month in range(1, 13)]}
        title = f"Average temperature in {city} by month, 2010"
        yield make("months", title, measure, unit, 1, "month", MONTHS, series, ordered=True)
        by_hour = vega.group(rows, lambda row: (int(row[0][5:7]), int(row[0][11:13])), lambda row: row[1])
        for month, name in enumerate(MONTHS, start=1):
            series = {"Temperature": [vega.mean(by_hour[month, hour]) for hour in hours.values()]}
            title = f"Average temperature in {city}, {name} 2010"
            yield make(f"hours {name}", title, measure, unit, 1, "time of day", tuple(hours), series, ordered=True)


def _weather() -> Iterable[Table]:
    make = _maker("seattle-weather", "National Oceanic and Atmospheric Administration")
    rows = vega.read_csv("seattle-weather.csv")  # date 2012/01/31
    sorts = ("sun", "fog", "drizzle", "rain", "snow")
    for year in ("2012", "2013", "2014", "2015"):
        months = vega.group(
            (row for row in rows if row["date"][:4] == year), lambda row: row["date"][5:7], lambda row: row
        )
        highs, lows, wind = (
            [vega.mean(float(row[column]) for row in days) for days in months.values()]
            for column in ("temp_max", "temp_min", "wind")
        )
        rain = [sum(float(row["precipitation"]) for row in days) for days in months.values()]
        wet = [sum(float(row["precipitation"]) > 0 for row in days) for days in months.values()]
        days_of = [sum(row["weather"] == sort for days in months.values() for row in days) for sort in sorts]
        for name, measure, unit, decimals, series in (
            ("temperature", "average temperature", "°C", 1, {"High": highs, "Low": lows}),
            ("wind speed", "average wind speed", "m/s", 1, {"Wind": wind}),
            ("precipitation", "precipitation", "mm", 0, {"Precipitation": rain}),
            ("days with precipitation", "number of wet days", "days", 0, {"Wet days": wet}),
        ):
            title = f"Seattle {name} by month, {year}"
            flags = {"ordered": True, "additive": decimals == 0, "series_noun": "temperature"}
            yield make(f"{name} {year}", title, measure, unit, decimals, "month", MONTHS, series, **flags)
        title, labels = f"Weather in Seattle, {year}", [sort.capitalize() for sort in sorts]
        series = {"Days": days_of}
        yield make(
            f"sorts {year}", title, "number of days", "days", 0, "kind of weather", labels, series, additive=True
        )


def _stocks() -> Iterable[Table]:
    make = _maker("stocks", "Vega datasets")
    companies = {"MSFT": "Microsoft", "AMZN": "Amazon", "IBM": "IBM", "GOOG": "Google", "AAPL": "Apple"}
    prices = vega.group(
        vega.read_csv("stocks.csv"), lambda r: (companies[r["symbol"]], r["date"][-4:]), lambda r: float(r["price"])
    )
    measure, unit = "average share price", "USD"
    for first, last in ((2000, 2004), (2005, 2009)):
        years = [str(year) for year in range(first, last + 1)]
        names = [name for name in companies.values() if all((name, year) in prices for year in years)]
        series = {name: [vega.mean(prices[name, year]) for year in years] for name in names}
        title = f"Share prices of technology companies, {first}-{last}"
        flags = {"series_noun": "company", "ordered": True}
        yield make(f"years {first}", title, measure, unit, 2, "year", years, series, **flags)
    for year in range(2000, 2010):
        names = [name for name in companies.values() if (name, str(year)) in prices]
        series = {"Price": [vega.mean(prices[name, str(year)]) for name in names]}
        title = f"Share prices of technology companies, {year}"
        yield make(f"companies {year}", title, measure, unit, 2, "company", names, series)


_SECTORS = {
    "construction": "Construction",
    "manufacturing": "Manufacturing",
    "retail_trade": "Retail trade",
    "information": "Information",
    "financial_activities": "Finance",
    "professional_and_business_services": "Business services",
    "education_and_health_services": "Education and health",
    "leisure_and_hospitality": "Leisure",
    "government": "Government",
}


def _employment() -> Iterable[Table]:
    make = _maker("us-employment", "U.S. Bureau of Labor Statistics")
    measure, unit = "number of jobs", "million"
    years = vega.group(vega.read_csv("us-employment.csv"), lambda row: row["month"][:4], lambda row: row)

    def jobs(year: str, column: str) -> float:
        return vega.mean(float(row[column]) for row in years[year]) / 1000  # the file counts thousands

    for year in years:
        series = {"Jobs": [jobs(year, column) for column in _SECTORS]}
        title, labels = f"Jobs in the United States by sector, {year}", tuple(_SECTORS.values())
        yield make(f"sectors {year}", title, measure, unit, 1, "sector", labels, series, additive=True)
    for start, group in zip((0, 3, 6), ("goods and retail", "office work", "public services and leisure"), strict=True):
        columns = tuple(_SECTORS)[start : start + 3]
        series = {_SECTORS[column]: [jobs(year, column) for year in years] for column in columns}
        title, flags = f"Jobs in {group}, United States", {"series_noun": "sector", "ordered": True}
        yield make(f"years {columns[0]}", title, measure, unit, 1, "year", tuple(years), series, **flags)


def _wheat() -> Iterable[Table]:
    make = _maker("wheat", "William Playfair (1822)")
    rows = [row for row in vega.read_json("wheat.json") if "wages" in row]  # 1565 to 1810, every five years
    for start in range(0, len(rows), 10):
        chosen = rows[start : start + 10]
        labels = [row["year"] for row in chosen]
        span = f"{labels[0]}-{labels[-1]}"
        series = {"Wheat": [row["wheat"] for row in chosen]}
        title, measure, unit = f"Price of wheat in England, {span}", "price of wheat", "shillings/quarter"
        yield make(f"prices {span}", title, measure, unit, 1, "year", labels, series, ordered=True)
        series = {"Wages": [row["wages"] for row in chosen]}
        title, measure, unit = f"Weekly wages in England, {span}", "weekly wage", "shillings"
        yield make(f"wages {span}", title, measure, unit, 2, "year", labels, series, ordered=True)
