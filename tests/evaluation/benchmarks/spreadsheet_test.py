"""The .xlsx writer: its parts are well-formed XML, and a reader of another kind finds every cell."""

import xml.etree.ElementTree as ElementTree
import zipfile

from moe_vlm_jax.evaluation.benchmarks import spreadsheet

MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
TABLE = [["index", "prediction"], ["241", "007"], ["1000241", 'a < b & "c"\n  d\x07 你好 '], ["3", ""]]


def cells(path) -> list[list]:
    """Reads the sheet with the standard library: numbers as int, inline strings as str."""
    with zipfile.ZipFile(path) as file:
        assert not file.testzip()
        for name in file.namelist():
            ElementTree.fromstring(file.read(name))
        root = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in root.iter(f"{MAIN}row"):
        rows.append(
            [
                int(cell.findtext(f"{MAIN}v")) if cell.get("t") is None else cell.findtext(f"{MAIN}is/{MAIN}t") or ""
                for cell in row
            ]
        )
    return rows


def test_every_cell_comes_back_and_only_the_named_column_is_numbers(tmp_path):
    spreadsheet.write(tmp_path / "a.xlsx", TABLE, numbers="index")
    assert cells(tmp_path / "a.xlsx") == [
        ["index", "prediction"],
        [241, "007"],
        [1000241, 'a < b & "c"\n  d� 你好 '],  # XML cannot hold a bell
        [3, ""],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.xlsx"]
