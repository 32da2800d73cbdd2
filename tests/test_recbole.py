"""prepare/recbole.py: sessions and events in RecBole's files, and bad input in one line."""

import pytest
from conftest import SHARED, needs_shared
from helpers import SMALL, SPLITS, examples, meta, prepared, read_lines, write_rows

from prepare import recbole
from prepare.dataset import load_dataset
from trsr import InputError

SESSION_HEADER = ["user_id:token", "item_id_list:token_seq", "item_id:token"]
EVENT_HEADER = ["user_id:token", "item_id:token", "timestamp:float"]


def write_games(folder, inter, item=None):
    """Write RecBole's two files; return the settings that name them."""
    names = [["item_id:token", "title:token_seq"], *([str(n), f"Game {n}"] for n in range(12))]
    write_rows(folder / "g.inter", inter)
    write_rows(folder / "g.item", item or names)
    return {"inter": folder / "g.inter", "item": folder / "g.item", "domain": "products"}


def test_recbole_sessions_exact(tmp_path, capsys):
    inter = [
        SESSION_HEADER,
        ["0", "1 2", "3"],
        ["7", "4 5 6", "7"],
        ["0", "8 9", "7"],
        ["8", "1 2", "9"],
    ]
    columns = ("item_id:token", "title:token_seq", "release_year:float", "brand:token")
    item = [[*columns, "v:float_seq"]]
    for n in range(10):
        item.append([str(n), f"Game &#39;{n}&#39;", "1999", "" if n == 1 else "Acme", "0.1 0.2"])
    out = prepared(recbole, **write_games(tmp_path, inter, item), out=tmp_path / "out", **SMALL)
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {"0": (["8", "9"], "7"), "7": (["4", "5", "6"], "7"), "8": (["1", "2"], "9")}
    assert meta(out)["dropped"]["rows of a user other than the one taken"] == 1
    items = {item["id"]: item["attributes"] for item in read_lines(out / "items.jsonl")}
    assert items["1"] == {"Title": "Game '1'", "Release year": "1999"}
    assert list(items["2"].items()) == [
        ("Title", "Game '2'"),
        ("Release year", "1999"),
        ("Brand", "Acme"),
    ]
    assert (meta(out)["domain"], meta(out)["attributes"]) == ("products", 3)
    assert capsys.readouterr().out.startswith(
        "Left out of the items' texts: v:float_seq\nItems from "
    )


@pytest.mark.parametrize(
    ("rows", "expected", "dropped"),
    [
        ("last", {"a": "4", "b": "9", "c": "6"}, 2),
        ("first", {"a": "3", "b": "9", "c": "5"}, 2),
        ("all", {"a": "3", "a#2": "4", "b": "9", "c": "5", "c#2": "6"}, 0),
    ],
)
def test_of_a_user_s_session_rows_the_last_the_first_or_all_are_taken(
    tmp_path, rows, expected, dropped
):
    inter = [["a", "1 2", "3"], ["b", "7 8", "9"], ["a", "1 2 3", "4"], ["c", "1 2", "5"]]
    inter.append(["c", "1 2 5", "6"])
    files = write_games(tmp_path, [SESSION_HEADER, *inter])
    out = prepared(recbole, **files, out=tmp_path / "out", **SMALL, rows=rows)
    assert {user: e["positive"] for user, e in examples(out).items()} == expected
    assert meta(out)["dropped"]["rows of a user other than the one taken"] == dropped


def test_recbole_events_are_sorted_by_time_and_the_last_is_the_target(tmp_path):
    times = {"a": "5 1 3", "b": "2 2 2", "c": "1e3 -4 7.5"}
    rows = [[u, str(n), t] for u, text in times.items() for n, t in enumerate(text.split())]
    files = write_games(tmp_path, [EVENT_HEADER, *rows])
    out = prepared(recbole, **files, out=tmp_path / "out", **SMALL)
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {"a": (["1", "2"], "0"), "b": (["0", "1"], "2"), "c": (["1", "2"], "0")}


def test_recbole_unknown_event_names_its_own_line(tmp_path):
    rows = [["a", "1", "3"], ["b", "2", "1"], ["a", "99", "1"], ["a", "2", "2"]]
    files = write_games(tmp_path, [EVENT_HEADER, *rows])
    with pytest.raises(InputError, match=r"g.inter:4: item '99' is not in the catalogue"):
        prepared(recbole, **files, out=tmp_path / "out", **SMALL)


# ---- Bad input


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        (
            [["user_id", "item_id:token"]],
            None,
            r"g.inter:1: column 'user_id' is not name:type with a type of token, ",
        ),
        (
            [["user_id:token", "item_id:token"]],
            None,
            r"g.inter:1: no column 'timestamp'; found user_id:token, item_id",
        ),
        ([["item_id_list:token_seq", "item_id:token"]], None, r"g.inter:1: no column 'user_id'"),
        (
            [SESSION_HEADER, ["0", "1 2"]],
            None,
            r"g.inter:2: 2 columns, expected 3 \(user_id:token, item_id_list:",
        ),
        (
            [EVENT_HEADER, ["0", "1", "noon"]],
            None,
            r"g.inter:2: column 'timestamp': 'noon' is no number",
        ),
        (
            [EVENT_HEADER, ["0", "1", "nan"]],
            None,
            r"g.inter:2: column 'timestamp': 'nan' is no number",
        ),
        (
            [SESSION_HEADER],
            [["title:token_seq"]],
            r"g.item:1: no column 'item_id'; found title:token_seq",
        ),
        (
            [SESSION_HEADER + SESSION_HEADER[:1]],
            None,
            r"g.inter:1: two columns of one name among user_id:token, item_",
        ),
        (
            [SESSION_HEADER],
            [["item_id:token", "title:text"]],
            r"g.item:1: column 'title:text' is not name:type",
        ),
        (
            [SESSION_HEADER],
            [["item_id:token", "title:token_seq"]],
            r"g.item: no item with a text in it",
        ),
    ],
)
def test_recbole_bad_input(tmp_path, inter, item, message):
    with pytest.raises(InputError, match=message):
        prepared(recbole, **write_games(tmp_path, inter, item), out=tmp_path / "out", **SMALL)


# ---- Real data


@needs_shared
def test_real_games(tmp_path):
    folder = SHARED / "data/games"
    files = {"inter": folder / "games.inter", "item": folder / "games.item", "domain": "products"}
    out = prepared(recbole, **files, out=tmp_path / "out")
    assert meta(out)["examples"] == {"train": 3490, "val": 349, "test": 349}
    assert list(meta(out)["dropped"].values()) == [0, 0, 0, 0, 20381, 704, 0, 0]
    items = (out / "items.jsonl").read_text("utf-8")
    assert "&amp;" not in items
    assert (
        '{"id": "11", "attributes": {"Title": "Phantasy Star Online, Episode I & II"}}\n' in items
    )
    _, texts, loaded = load_dataset(out, SPLITS)
    assert len(texts) == meta(out)["items"] == 15678
    assert all(10 <= len(e.history) <= 25 for split in SPLITS for e in loaded[split])


def test_times_are_exact_beyond_what_a_float_can_tell_apart(tmp_path):
    start = 2**53
    times = [str(start + n) for n in (3, 1, 2, 0)] + [f"{start + 4}.0"]
    inter = [EVENT_HEADER, *(["u", str(n), time] for n, time in enumerate(times))]
    inter += [[user, str(n), str(n)] for user in ("v", "w") for n in range(4)]
    games = write_games(tmp_path, inter)
    found = examples(prepared(recbole, **games, out=tmp_path / "out", **SMALL | {"max_history": 4}))
    assert (found["u"]["history"], found["u"]["positive"]) == (["3", "1", "2", "0"], "4")


def test_two_columns_of_one_attribute_are_refused(tmp_path):
    item = [["item_id:token", "release_year:float", "Release_year:float"], ["1", "1999", "2001"]]
    inter = [SESSION_HEADER, ["0", "1", "1"]]
    with pytest.raises(InputError, match=r"g\.item:1: columns .* both become 'Release year'"):
        prepared(recbole, **write_games(tmp_path, inter, item), out=tmp_path / "out", **SMALL)


@pytest.mark.parametrize("missing", ["NaN", "nan", "None", "NULL", " null "])
def test_words_for_a_missing_value_are_no_texts(tmp_path, missing):
    names = [["item_id:token", "title:token_seq", "price:float"]]
    names += [[str(n), f"Game {n}", missing if n == 1 else "9.99"] for n in range(10)]
    inter = [SESSION_HEADER, *([str(u), "1 2", str(3 + u)] for u in range(3))]
    out = prepared(recbole, **write_games(tmp_path, inter, names), out=tmp_path / "out", **SMALL)
    items = {item["id"]: item["attributes"] for item in read_lines(out / "items.jsonl")}
    assert items["1"] == {"Title": "Game 1"}
    assert items["2"] == {"Title": "Game 2", "Price": "9.99"}
