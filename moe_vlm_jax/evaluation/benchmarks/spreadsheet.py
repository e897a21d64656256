"""One sheet of text as an .xlsx file, which MMBench's server wants; Office Open XML (ECMA-376), inline strings."""

import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from xml.sax import saxutils

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPE}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")  # no XML file can hold them


def write(path: pathlib.Path, table: Sequence[Sequence[str]], *, numbers: str) -> None:
    """Writes the rows below a head; the column `numbers` holds numbers, every other one text."""
    column = table[0].index(numbers)
    rows = "".join(
        f"<row>{''.join(_cell(text, number=i == column and bool(n)) for i, text in enumerate(row))}</row>"
        for n, row in enumerate(table)
    )
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{rows}</sheetData></worksheet>'
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (_PARTS | {"xl/worksheets/sheet1.xml": sheet}).items():
            file.writestr(name, _HEAD + content)
    os.replace(partial, path)


def _cell(text: str, *, number: bool) -> str:
    if number:
        return f"<c><v>{text}</v></c>"
    kept = saxutils.escape(_FORBIDDEN.sub("�", text))
    return f'<c t="inlineStr"><is><t xml:space="preserve">{kept}</t></is></c>'
