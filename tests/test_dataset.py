"""prepare/dataset.py: every broken line of a dataset is named, with its file, line and field."""

import json

import pytest
from helpers import write_dataset

from files.atomic import atomic_write
from files.jsonl import read_json
from prepare.dataset import load_dataset, popularity
from prepare.domains import DOMAINS
from trsr import InputError


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data")


def test_a_dataset_loads(data):
    domain, items, splits = load_dataset(data, ("train", "val", "test"))
    assert domain is DOMAINS["products"]
    assert len(items) == 60
    assert items["i0"].startswith("Title: ")
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 12,
        "val": 4,
        "test": 4,
    }
    counts = popularity(splits["val"])
    assert counts.total() == sum(len(e.history) + 1 for e in splits["val"])


def edit(path, line, change):
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = change(lines[line - 1])
    path.write_bytes(b"\n".join(lines))


def field(name, value):
    def change(line):
        record = json.loads(line)
        record |= {name: value(record) if callable(value) else value}
        return json.dumps({k: v for k, v in record.items() if v is not ...}).encode()

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train.jsonl", lambda line: line[:-3], "train.jsonl:2: not JSON"),
        ("train.jsonl", lambda line: b"[1]", "train.jsonl:2: field 'user' is missing"),
        ("train.jsonl", lambda line: b"\xff\xfe", "train.jsonl:2: not UTF-8"),
        ("train.jsonl", lambda line: b"", "train.jsonl:2: not JSON"),
        ("train.jsonl", field("history", ...), "field 'history' is missing"),
        ("train.jsonl", field("history", "i1"), "field 'history' is a str, expected list"),
        (
            "train.jsonl",
            field("history", [1]),
            "field 'history' holds something that is not a text",
        ),
        ("train.jsonl", field("user", 7), "field 'user' is a int, expected str"),
        ("train.jsonl", field("user", "train0"), "field 'user': 'train0' is there twice"),
        (
            "train.jsonl",
            field("history", ["i1", "ghost"]),
            "train.jsonl:2: item 'ghost' is not in items.jsonl",
        ),
        ("train.jsonl", field("positive", "ghost"), "item 'ghost' is not in items.jsonl"),
        ("val.jsonl", field("negatives", ["i1", ""]), "val.jsonl:2: item '' is not in items.jsonl"),
        (
            "train.jsonl",
            field("history", lambda r: [r["positive"]]),
            "field 'history' holds the target",
        ),
        (
            "train.jsonl",
            field("negatives", lambda r: [r["positive"]]),
            "field 'negatives' is empty, repeats",
        ),
        ("train.jsonl", field("negatives", []), "field 'negatives' is empty"),
        (
            "val.jsonl",
            field("user", "train0"),
            "val.jsonl:2: field 'user': 'train0' is there twice",
        ),
        ("items.jsonl", field("id", "i0"), "items.jsonl:2: field 'id': item 'i0' is there twice"),
        ("items.jsonl", field("attributes", ["x"]), "field 'attributes' is a list, expected dict"),
        ("items.jsonl", field("attributes", {"Title": 5}), "field 'attributes' holds something"),
        ("meta.json", lambda line: b"", "meta.json: no JSON object"),
    ],
)
def test_a_broken_line_is_named(data, file, change, message):
    edit(data / file, 1 if file == "meta.json" else 2, change)
    with pytest.raises(InputError) as error:
        load_dataset(data, ("train", "val"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_pieces_are_named(data, tmp_path):
    with pytest.raises(InputError, match=r"prepare\.demo"):
        load_dataset(tmp_path / "nothing", ("train",))
    (data / "val.jsonl").write_text("")
    with pytest.raises(InputError, match=r"val\.jsonl: no users"):
        load_dataset(data, ("val",))
    (data / "val.jsonl").unlink()
    with pytest.raises(InputError, match=r"val\.jsonl: no such file"):
        load_dataset(data, ("val",))
    (data / "meta.json").write_text('{"domain": "films"}')
    with pytest.raises(InputError, match="field 'domain' is 'films'"):
        load_dataset(data, ("train",))


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines(["half of the new", 7])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_read_json_names_what_is_no_object(tmp_path):
    for text in ("", "[1]", '"x"', "nan", "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=r"x\.json: no JSON object"):
            read_json(tmp_path / "x.json")
