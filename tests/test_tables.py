"""prepare/tables.py: rows with their lines, whatever is quoted in them, and what is missing."""

import hashlib

import pytest

from prepare.tables import Table, attributes
from trsr import InputError


def test_rows_come_with_their_lines_and_quotes_mean_nothing(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('\ufeffid\ttitle\n1\t"a\n2\tb"\n', "utf-8", newline="\r\n")
    table = Table(path, ("id",))
    rows = [(f"{path}:2", {"id": "1", "title": '"a'}), (f"{path}:3", {"id": "2", "title": 'b"'})]
    assert list(table) == rows
    assert list(table) == rows  # each reading starts anew
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert table.source() == {"file": "t.tsv", "sha256": digest, "rows": 2}


def test_missing_columns_and_cut_rows_are_named(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("id\ttitle\n1\n")
    with pytest.raises(InputError, match=r"t\.tsv:1: no column 'price'; expected id, price, found"):
        Table(path, ("id", "price"))
    with pytest.raises(InputError, match=r"t\.tsv:2: 1 columns, expected 2 \(id, title\)"):
        list(Table(path, ("id",)))
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        Table(tmp_path / "nowhere")


def test_attributes_are_decoded_and_missing_values_left_out():
    pairs = [("A", "x &amp; y"), ("B", " "), ("C", "NaN"), ("D", "null"), ("E", "Nancy"), ("F", "")]
    assert attributes(pairs) == {"A": "x & y", "E": "Nancy"}
    pairs = [
        ("A", "Oven&microwave R&D"),
        ("B", "&#39;&#x41;&eacute;&nosuch; &amp &"),
        ("C", "a&b;"),
    ]
    assert attributes(pairs) == {"A": "Oven&microwave R&D", "B": "'Aé&nosuch; &amp &", "C": "a&b;"}
