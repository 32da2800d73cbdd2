"""files/sheet.py: what a text holds comes back whole."""

import csv

from files.sheet import write_csv


def test_texts_come_back_as_they_are(tmp_path):
    rows = [["a,b", 'say "no"', "two\nlines", " é ☃ ", 0.1 + 0.2], ["=1+1", "", "x\r\ny", "'", 3]]
    path = tmp_path / "t.csv"
    write_csv(path, ["one", "two", "three", "four", "five"], [*rows, [None] * 5])
    with open(path, newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["one", "two", "three", "four", "five"]
    assert found == [[str(value) for value in row] for row in rows] + [[""] * 5]
    assert float(found[0][4]) == 0.1 + 0.2
    assert path.read_bytes().endswith(b"\n,,,,\n")
