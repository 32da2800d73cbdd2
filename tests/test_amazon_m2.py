"""prepare/amazon_m2.py: one locale's sessions, with little memory, and bad input in one line."""

import csv
import tracemalloc

import pytest
from helpers import SMALL, examples, meta, prepared, read_lines, write_amazon

from prepare import amazon_m2
from trsr import InputError


def amazon_rows(folder, products, sessions):
    folder.mkdir(exist_ok=True)
    for name, columns, rows in (
        ("products_train.csv", amazon_m2.PRODUCTS, products),
        ("sessions_train.csv", amazon_m2.SESSIONS, sessions),
    ):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    return folder


def product(item, locale="UK", title="Jug"):
    texts = ["9.99", "Acme", "red", "1 l", "M&quot;1", "tin", "Ann", "Holds, pours\nand stands"]
    return [item, locale, title, *texts]


def test_amazon_examples_exact(tmp_path):
    products = [product(f"B{n}") for n in range(8)] + [product("B1", "DE", "Krug")]
    sessions = [["['B0' 'B1'\n 'B2']", "B3", "UK"], ["['B1' 'B1']", "B1", "DE"]]
    sessions += [["['B1'  'B2' ]", "B4", "UK"], ["['B5' 'B6']", "B1", "UK"], ["[]", "B1", "UK"]]
    raw = amazon_rows(tmp_path / "raw", products, sessions)
    out = prepared(amazon_m2, raw=raw, out=tmp_path / "out", **SMALL)
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {
        "UK-1": (["B0", "B1", "B2"], "B3"),
        "UK-3": (["B1", "B2"], "B4"),
        "UK-4": (["B5", "B6"], "B1"),
    }
    texts = {item["id"]: item["attributes"] for item in read_lines(out / "items.jsonl")}
    assert texts["B1"] == {
        "Title": "Jug",
        "Price": "9.99",
        "Brand": "Acme",
        "Color": "red",
        "Size": "1 l",
        "Model": 'M"1',
        "Material": "tin",
        "Author": "Ann",
        "Description": "Holds, pours\nand stands",
    }
    dropped = {name: n for name, n in meta(out)["dropped"].items() if n}
    assert dropped == {"sessions of other locales": 1, "history too short": 1}
    assert meta(out)["settings"]["locale"] == "UK"


def test_amazon_unknown_target_drops_the_user(tmp_path):
    sessions = [["['B0' 'B1']", target, "UK"] for target in ("B2", "B3", "B4", "B99")]
    raw = amazon_rows(tmp_path / "raw", [product(f"B{n}") for n in range(8)], sessions)
    message = r"sessions_train.csv:5: item 'B99' is not in the catalogue"
    with pytest.raises(InputError, match=message):
        prepared(amazon_m2, raw=raw, out=tmp_path / "out", **SMALL)
    out = prepared(amazon_m2, raw=raw, out=tmp_path / "out", **SMALL, drop_unknown=True)
    assert sorted(examples(out)) == ["UK-1", "UK-2", "UK-3"]
    assert meta(out)["dropped"]["unknown targets"] == 1


def test_amazon_holds_no_texts_but_those_it_writes(tmp_path):
    peaks, sizes = [], []
    for description in (40, 4000):
        raw = write_amazon(tmp_path / f"raw{description}", 2000, 500, description=description)
        tracemalloc.start()
        out = prepared(amazon_m2, raw=raw, out=tmp_path / f"out{description}", users=12)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((raw / "products_train.csv").stat().st_size)
    assert sizes[1] - sizes[0] > 7e6  # 2,000 texts of 4,000 characters more
    assert peaks[1] - peaks[0] < 3e5
    assert len(read_lines(out / "items.jsonl")) <= 12 * 27 + 2 * 20
    assert meta(out)["examples"] == {"train": 10, "val": 1, "test": 1}


# ---- Bad input


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "products",
            "locale,title",
            "locale,name",
            r"products_train.csv:1: no column 'title'; expected id, locale, ",
        ),
        (
            "sessions",
            "next_item",
            "next",
            r"sessions_train.csv:1: no column 'next_item'; .*found prev_items, next, lo",
        ),
        (
            "products",
            "UK",
            "JP",
            r"products_train.csv: no row of locale 'UK'; found DE, JP; choose another --locale",
        ),
        (
            "sessions",
            "UK",
            "FR",
            r"sessions_train.csv: no row of locale 'UK'; found DE, FR; choose another --locale",
        ),
        (
            "sessions",
            "'B0' 'B1'",
            "'B0' B1",
            r"sessions_train.csv:4: column 'prev_items': \"\['B0' B1\]\" is no list",
        ),
        (
            "sessions",
            "['B0' 'B1']",
            "B0 B1",
            r"sessions_train.csv:4: column 'prev_items': 'B0 B1' is no list like",
        ),
        (
            "sessions",
            "['B0' 'B1']",
            "\"['B0', 'B1']\"",
            r"sessions_train.csv:4: column 'prev_items': .* is no list",
        ),
        (
            "sessions",
            "'B1'],B2",
            "'B1']",
            r"sessions_train.csv:4: 2 columns, expected 3 \(prev_items, next_item, ",
        ),
        (
            "products",
            'stands"',
            "",
            r"products_train.csv:\d+: not comma-separated text \(.*\); is the file whole\?",
        ),
        ("products", "B1,UK", "B0,UK", r"products_train.csv:4: item 'B0' is there twice"),
    ],
)
def test_amazon_bad_input(tmp_path, name, old, new, message):
    products = [*(product(f"B{n}") for n in range(8)), product("B1", "DE")]
    sessions = [["['B3'\n 'B4']", "B5", "UK"], ["['B0' 'B1']", "B2", "UK"], ["['B0']", "B1", "DE"]]
    raw = amazon_rows(tmp_path / "raw", products, sessions)
    path = raw / f"{name}_train.csv"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(InputError, match=message) as caught:
        prepared(amazon_m2, raw=raw, out=tmp_path / "out", **SMALL)
    assert "\n" not in str(caught.value)


def test_amazon_without_rows(tmp_path):
    raw = amazon_rows(tmp_path / "raw", [], [])
    message = r"products_train.csv: no row of locale 'UK'; found no row at all"
    with pytest.raises(InputError, match=message):
        prepared(amazon_m2, raw=raw, out=tmp_path / "out")
    (raw / "products_train.csv").write_text("")
    message = r"products_train.csv:1: no column 'id'; expected .*, found an empty file"
    with pytest.raises(InputError, match=message):
        prepared(amazon_m2, raw=raw, out=tmp_path / "out")
