"""prepare/dataset.py: every broken line of a dataset is named, with its file, line and field."""

import json

import pytest
from helpers import meta, write_dataset

from files.jsonl import write_json
from prepare.dataset import (
    SHOP,
    default_model,
    drawn_in_training,
    load_dataset,
    popularity,
    save_dataset,
    warn_of_cut_histories,
)
from prepare.domains import DOMAINS
from trsr import Example, InputError


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data")


def test_a_dataset_loads(data):
    domain, items, splits = load_dataset(data, ("train", "val", "test"))
    assert domain is DOMAINS["products"]
    assert len(items) == 60
    assert items["i0"].startswith("Title: ")
    sizes = {split: len(examples) for split, examples in splits.items()}
    assert sizes == {"train": 12, "val": 4, "test": 4}
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
        ("train.jsonl", field("user", 7), "field 'user' is an int, expected str"),
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
    with pytest.raises(InputError, match=r"no dataset \(no meta\.json\)"):
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


def test_meta_is_written_last_so_that_a_folder_with_one_is_complete(tmp_path):
    example = {"user": "ü", "history": ["a", "b"], "positive": "c", "negatives": ["d"]}
    (tmp_path / "meta.json").write_text('{"made_by": "prepare.test"}')

    def items():
        assert not (tmp_path / "meta.json").exists()
        yield {"id": "a", "attributes": {"Title": "é\n"}}
        yield {"id": "b", "attributes": {"Title": "x", "Brand": "y"}}

    splits = {"train": [example], "val": [], "test": []}
    saved = save_dataset(tmp_path, splits, items(), {"made_by": "prepare.test", "domain": "news"})
    assert saved == {
        "made_by": "prepare.test",
        "domain": "news",
        "examples": {"train": 1, "val": 0, "test": 0},
        "items": 2,
        "mean_history": 2.0,
        "attributes": 2,
        "mean_attributes": 1.5,
    }
    assert saved == meta(tmp_path)
    line = '{"user": "ü", "history": ["a", "b"], "positive": "c", "negatives": ["d"]}\n'
    assert (tmp_path / "train.jsonl").read_text("utf-8") == line
    line = '{"id": "a", "attributes": {"Title": "é\\n"}}\n'
    assert (tmp_path / "items.jsonl").read_text("utf-8").startswith(line)


# ---- What is not overwritten, and whose model is the default


def saved(out, command="prepare.test", text="lamp"):
    example = {"user": "u", "history": ["1"], "positive": "2", "negatives": ["3"]}
    items = [{"id": str(n), "attributes": {"Title": f"{text} {n}"}} for n in (1, 2, 3)]
    return save_dataset(out, {"train": [example]}, items, {"made_by": command, "domain": "news"})


def test_a_dataset_of_another_hand_is_not_overwritten(tmp_path, data, capsys):
    saved(tmp_path / "own")
    saved(tmp_path / "own", text="chair")
    assert "replacing the dataset that python -m prepare.test wrote" in capsys.readouterr().out
    assert "chair 1" in (tmp_path / "own/items.jsonl").read_text()

    written_by_hand = {path: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(InputError, match=r"did not write \(meta\.json, items\.jsonl, train"):
        saved(data)
    with pytest.raises(InputError, match="choose another --out, or delete it first"):
        saved(tmp_path / "own", "prepare.other")
    assert {path: path.read_bytes() for path in data.iterdir()} == written_by_hand


def test_no_message_suggests_to_write_over_data(data, tmp_path):
    (data / "meta.json").unlink()
    with pytest.raises(InputError, match=r'add one with {"domain": "products"}') as error:
        load_dataset(data, ("train",))
    assert "prepare.demo" not in str(error.value)
    with pytest.raises(InputError, match=r"docs/data\.md says how to make one"):
        load_dataset(tmp_path / "nowhere", ("train",))


def test_the_embedded_model_is_the_default_of_its_own_shop_alone(data, tmp_path):
    assert default_model(str(tmp_path / "nowhere"), "models/tiny") == "models/tiny"
    saved(tmp_path / "shop", SHOP)
    assert default_model(str(tmp_path / "shop"), "models/tiny") == "models/tiny"
    saved(tmp_path / "games", "prepare.recbole")
    for folder in (data, tmp_path / "games"):
        with pytest.raises(InputError, match="--model is needed: models/tiny, the default, knows"):
            default_model(str(folder), "models/tiny")


def test_training_draws_nothing_that_came_after_its_time(tmp_path, capsys):
    items = {"a": "A", "b": "B", "c": "C", "d": "D", "later": "L"}
    train = [Example("u", ["a", "b"], "c", ["d"])]
    folder = tmp_path / "data"
    folder.mkdir()
    for more, expected in (({}, [*items]), ({"moments": []}, ["a", "b", "c", "d"])):
        write_json(folder / "meta.json", {"domain": "products", **more})
        assert drawn_in_training(folder, items, train) == expected
    warn_of_cut_histories(folder, drawn=True)
    assert capsys.readouterr().out == ""
    write_json(folder / "meta.json", {"domain": "products", "settings": {"long": "cut"}})
    warn_of_cut_histories(folder, drawn=False)
    assert capsys.readouterr().out == ""
    warn_of_cut_histories(folder, drawn=True)
    assert "a negative can be an item that the user once had" in capsys.readouterr().out
