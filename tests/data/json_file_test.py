"""Broken files are refused with the place of the break."""

import pytest

from moe_vlm_jax.data import json_file


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json' does not exist; correct data\.path"):
        json_file.read_json(tmp_path / "none.json")


def test_malformed_json_is_refused_with_file_line_and_column(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"id": 1},\n {"id": 2},\n {"id" 3}]\n')
    with pytest.raises(ValueError, match=r"rows\.json, line 3, column 8: Expecting ':' .*one JSON document; mend that"):
        json_file.read_json(file)


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(b'["caf\xe9"]')
    with pytest.raises(ValueError, match=r"rows\.json: byte 5 is not UTF-8; save the file as UTF-8"):
        json_file.read_json(file)
