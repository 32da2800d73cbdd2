"""The readers of raw data: exact examples out, every filter counted, every bad input in one line."""

import csv
import hashlib
import json
import random
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from collections import Counter
from itertools import accumulate

import pytest
from conftest import SHARED, needs_shared
from helpers import ROOT

from prepare import amazon_m2, mind, recbole
from prepare.common import Session, choose, draw_negatives, make_splits, save_dataset, split_sizes
from prepare.dataset import load_dataset
from trsr import InputError

SMALL = ["--min-history", "2", "--max-history", "3", "--eval-negatives", "2"]
SPLITS = ("train", "val", "test")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")


def write_mind(folder, behaviors, n_news=12, news=()):
    rows = [
        [f"N{n}", "news", "local", f"Title {n}", f"About {n}", "", "[]", "[]"]
        for n in range(n_news)
    ]
    write_rows(folder / "news.tsv", [*rows, *news])
    rows = [
        [str(n), user, "11/12/2019 2:14:46 PM", *rest]
        for n, (user, *rest) in enumerate(behaviors, 1)
    ]
    write_rows(folder / "behaviors.tsv", rows)
    return folder


def write_games(folder, inter, item=None):
    write_rows(folder / "g.inter", inter)
    rows = [["item_id:token", "title:token_seq"], *([str(n), f"Game {n}"] for n in range(12))]
    write_rows(folder / "g.item", item or rows)
    return [
        "--inter",
        str(folder / "g.inter"),
        "--item",
        str(folder / "g.item"),
        "--domain",
        "products",
    ]


def write_amazon(folder, n_products, n_sessions, locales=("UK", "DE"), description=40, seed=0):
    """Write Amazon-M2 as published, of any size; a fifth of the sessions has 10 or more previous items."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "products_train.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(amazon_m2.PRODUCTS)
        for n in range(n_products):
            text = "Holds &amp; pours, " * (description // 18)
            row = [
                f"B{n:09}",
                locales[n % len(locales)],
                f'Jug "{n}"\nlarge',
                9.5,
                "Acme",
                "",
                "1 l",
                "",
                "Tin",
                "",
            ]
            write([*row, text])
    with open(folder / "sessions_train.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(amazon_m2.SESSIONS)
        for n in range(n_sessions):
            length = rng.randint(10, 25) if rng.random() < 0.2 else rng.randint(1, 4)
            kind = n % len(locales)
            spread = n_products // len(locales)
            *items, target = (
                f"B{int(rng.random() * spread) * len(locales) + kind:09}" for _ in range(length + 1)
            )
            lines = [
                " ".join(f"'{item}'" for item in items[k : k + 5]) for k in range(0, length, 5)
            ]
            write(["[" + "\n ".join(lines) + "]", target, locales[kind]])
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def examples(folder):
    return {e["user"]: e for split in SPLITS for e in read(folder, split)}


def meta(folder):
    return json.loads((folder / "meta.json").read_text("utf-8"))


def prepared(module, *arguments):
    """Run a reader's main and return its output folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
    return arguments[arguments.index("--out") + 1]


# ---------------------------------------------------------------------------------------------------------------------
# MIND


def test_mind_takes_a_users_first_row_and_counts_each_filter(tmp_path, capsys):
    raw = write_mind(
        tmp_path / "raw",
        [
            ("short", "N0 N1", "N5-1"),
            ("a", "N0 N1 N2", ""),
            ("a", "N3 N4 N5", "not read here"),
            ("long", "N0 N1 N2 N3 N4", ""),
            ("again", "N0 N1 N0", ""),
            ("b", "N1 N1 N2 N3", ""),
            ("none", "", ""),
            ("c", "N4 N5 N6", ""),
        ],
    )
    out = prepared(mind, "--raw", raw, "--out", tmp_path / "out", *SMALL)
    found = examples(out)
    assert {user: (e["history"], e["positive"]) for user, e in found.items()} == {
        "a": (["N0", "N1"], "N2"),
        "b": (["N1", "N1", "N2"], "N3"),
        "c": (["N4", "N5"], "N6"),
    }
    expected = [1, 0, 0, 2, 1, 1, 0]
    assert list(meta(out)["dropped"].values()) == expected
    assert next(iter(meta(out)["dropped"])) == "rows of a user already taken"
    printed = capsys.readouterr().out
    assert "Read 12 rows of news.tsv and 8 rows of behaviors.tsv; dropped:" in printed
    assert "          2  history too short" in printed
    assert "1 train, 1 val, 1 test users" in printed
    assert printed.endswith(
        f"python summarize.py --data {out} --model DIR_OR_HUB_ID --run runs/out\n"
    )


def test_mind_items_are_those_mentioned_in_catalogue_order_with_entities_decoded(tmp_path):
    news = [
        ["N12", "food", "", "Fish &amp; chips &lt;3", "  &nbsp; ", "", "[]", "[]"],
        ["N13", "never mentioned", "", "", "", "", "[]", "[]"],
    ]
    behaviors = [(user, "N12 N1 N0", "") for user in "abc"]
    arguments = ["--target", "history", *SMALL, "--eval-negatives", "1"]
    raw = write_mind(tmp_path / "raw", behaviors, n_news=3, news=news)
    out = prepared(mind, "--raw", raw, "--out", tmp_path / "out", *arguments)
    items = read(out, "items")
    assert [item["id"] for item in items] == [
        i for i in ("N0", "N1", "N2", "N12", "N13") if i in str(examples(out))
    ]
    assert items[0] == {
        "id": "N0",
        "attributes": {
            "Category": "news",
            "SubCategory": "local",
            "Title": "Title 0",
            "Abstract": "About 0",
        },
    }
    food = next(item for item in items if item["id"] == "N12")
    assert food["attributes"] == {"Category": "food", "Title": "Fish & chips <3"}


def test_mind_meta_is_whole_and_has_no_paths(tmp_path):
    raw = write_mind(tmp_path / "raw", [(f"u{n}", "N0 N1 N2", "") for n in range(30)])
    out = prepared(
        mind, "--raw", raw, "--out", tmp_path / "out", *SMALL, "--users", "24", "--seed", "7"
    )
    n_items = len(read(out, "items"))
    sources = [
        {
            "file": name,
            "sha256": hashlib.sha256((raw / name).read_bytes()).hexdigest(),
            "rows": rows,
        }
        for name, rows in (("news.tsv", 12), ("behaviors.tsv", 30))
    ]
    settings = {
        "users": 24,
        "min_history": 2,
        "max_history": 3,
        "drop_unknown": False,
        "train_negatives": 1,
    }
    settings |= {"eval_negatives": 2, "negatives": "uniform", "target": "history"}
    dropped = dict.fromkeys(meta(out)["dropped"], 0) | {"users beyond --users": 6}
    assert meta(out) == {
        "domain": "news",
        "seed": 7,
        "settings": settings,
        "sources": sources,
        "dropped": dropped,
        "examples": {"train": 20, "val": 2, "test": 2},
        "items": n_items,
        "mean_history": 2.0,
        "attributes": 4,
        "mean_attributes": 4.0,
    }


def test_unknown_ids_are_an_error_or_dropped_and_counted(tmp_path):
    news = [["N20", "", "", " ", "", "", "[]", "[]"]]
    behaviors = [(user, "N0 N77 N1 N20 N2 N78", "") for user in "abc"]
    raw = write_mind(tmp_path / "raw", [*behaviors, ("d", "N0 N1 N78", "")], news=news)
    with pytest.raises(
        InputError,
        match=r"behaviors.tsv:1: item 'N77' is not in the catalogue; --drop-unknown drops",
    ):
        prepared(mind, "--raw", raw, "--out", tmp_path / "no", *SMALL)
    assert not (tmp_path / "no").exists()
    out = prepared(mind, "--raw", raw, "--out", tmp_path / "out", *SMALL, "--drop-unknown")
    assert all(
        e["history"] == ["N0", "N1"] and e["positive"] == "N2" for e in examples(out).values()
    )
    dropped = meta(out)["dropped"]
    assert (dropped["unknown ids in histories"], dropped["history too short"]) == (10, 1)


def test_an_item_without_text_is_like_an_unknown_one(tmp_path):
    raw = write_mind(
        tmp_path / "raw", [("a", "N20 N0 N1", "")], news=[["N20", "", "", " ", "", "", "[]", "[]"]]
    )
    with pytest.raises(
        InputError,
        match=r"behaviors.tsv:1: item 'N20' has no text in the catalogue; --drop-unknown",
    ):
        prepared(mind, "--raw", raw, "--out", tmp_path / "out", *SMALL)


def test_mind_impressions_give_target_and_negatives(tmp_path):
    behaviors = [
        ("a", "N0 N1", "N2-0 N3-0"),
        ("a", "N0 N1", "N2-0 N3-1 N4-0"),
        ("a", "N0 N1", "N3-0 N0-0 N9-0 N5-1 N4-0 N6-1 N3-0 N7-0"),
        ("a", "N0 N1", "N2-0 N3-0 N4-1 N5-0"),
        ("b", "N0 N1", "N0-1 N2-0 N3-0 N4-0"),
        ("c", "N1 N2 N3", "N5-1 N6-0 N7-0 N8-0"),
        ("d", "N1 N2", "N6-1 N5-0 N7-0 N8-0"),
    ]
    raw = write_mind(tmp_path / "raw", behaviors)
    arguments = [
        *SMALL,
        "--eval-negatives",
        "3",
        "--train-negatives",
        "3",
        "--target",
        "impressions",
    ]
    out = prepared(mind, "--raw", raw, "--out", tmp_path / "out", *arguments)
    found = examples(out)
    assert {user: (e["history"], e["positive"]) for user, e in found.items()} == {
        "a": (["N0", "N1"], "N5"),
        "c": (["N1", "N2", "N3"], "N5"),
        "d": (["N1", "N2"], "N6"),
    }
    # N0 is in the history, N6 was clicked too, N3 was shown twice.
    assert len(set(found["a"]["negatives"])) == 3
    assert set(found["a"]["negatives"]) < {"N3", "N4", "N7", "N9"}
    assert set(found["c"]["negatives"]) == {"N6", "N7", "N8"}
    dropped = {name: n for name, n in meta(out)["dropped"].items() if n}
    assert dropped == {
        "rows without a click": 1,
        "rows with too few shown and unclicked": 1,
        "rows of a user already taken": 1,
        "target already in history": 1,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Amazon-M2


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
    return [
        item,
        locale,
        title,
        "9.99",
        "Acme",
        "red",
        "1 l",
        "M&quot;1",
        "tin",
        "Ann",
        "Holds, pours\nand stands",
    ]


def test_amazon_examples_exact(tmp_path):
    products = [product(f"B{n}") for n in range(8)] + [product("B1", "DE", "Krug")]
    sessions = [["['B0' 'B1'\n 'B2']", "B3", "UK"], ["['B1' 'B1']", "B1", "DE"]]
    sessions += [["['B1'  'B2' ]", "B4", "UK"], ["['B5' 'B6']", "B1", "UK"], ["[]", "B1", "UK"]]
    raw = amazon_rows(tmp_path / "raw", products, sessions)
    out = prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out", *SMALL)
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {
        "UK-1": (["B0", "B1", "B2"], "B3"),
        "UK-3": (["B1", "B2"], "B4"),
        "UK-4": (["B5", "B6"], "B1"),
    }
    assert next(item for item in read(out, "items") if item["id"] == "B1")["attributes"] == {
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
    with pytest.raises(
        InputError, match=r"sessions_train.csv:5: item 'B99' is not in the catalogue"
    ):
        prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out", *SMALL)
    out = prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out", *SMALL, "--drop-unknown")
    assert sorted(examples(out)) == ["UK-1", "UK-2", "UK-3"]
    assert meta(out)["dropped"]["unknown targets"] == 1


def test_amazon_holds_no_texts_but_those_it_writes(tmp_path):
    peaks, sizes = [], []
    for description in (40, 4000):
        raw = write_amazon(tmp_path / f"raw{description}", 2000, 500, description=description)
        tracemalloc.start()
        out = prepared(
            amazon_m2, "--raw", raw, "--out", tmp_path / f"out{description}", "--users", "12"
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((raw / "products_train.csv").stat().st_size)
    assert sizes[1] - sizes[0] > 7e6  # 2,000 texts of 4,000 characters more
    assert peaks[1] - peaks[0] < 3e5
    assert len(read(out, "items")) <= 12 * 27 + 2 * 20
    assert meta(out)["examples"] == {"train": 10, "val": 1, "test": 1}


# ---------------------------------------------------------------------------------------------------------------------
# RecBole

SESSION_HEADER = ["user_id:token", "item_id_list:token_seq", "item_id:token"]
EVENT_HEADER = ["user_id:token", "item_id:token", "timestamp:float"]


def test_recbole_sessions_exact(tmp_path, capsys):
    inter = [
        SESSION_HEADER,
        ["0", "1 2", "3"],
        ["7", "4 5 6", "7"],
        ["0", "8 9", "7"],
        ["8", "1 2", "9"],
    ]
    item = [
        ["item_id:token", "title:token_seq", "release_year:float", "brand:token", "v:float_seq"]
    ]
    item += [
        [str(n), f"Game &#39;{n}&#39;", "1999", "" if n == 1 else "Acme", "0.1 0.2"]
        for n in range(10)
    ]
    out = prepared(recbole, *write_games(tmp_path, inter, item), "--out", tmp_path / "out", *SMALL)
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {"0": (["1", "2"], "3"), "7": (["4", "5", "6"], "7"), "8": (["1", "2"], "9")}
    assert meta(out)["dropped"]["rows of a user already taken"] == 1
    items = {item["id"]: item["attributes"] for item in read(out, "items")}
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


def test_recbole_events_are_sorted_by_time_and_the_last_is_the_target(tmp_path):
    times = {"a": "5 1 3", "b": "2 2 2", "c": "1e3 -4 7.5"}
    rows = [
        [user, str(n), time] for user, text in times.items() for n, time in enumerate(text.split())
    ]
    out = prepared(
        recbole, *write_games(tmp_path, [EVENT_HEADER, *rows]), "--out", tmp_path / "out", *SMALL
    )
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {"a": (["1", "2"], "0"), "b": (["0", "1"], "2"), "c": (["1", "2"], "0")}


def test_recbole_unknown_event_names_its_own_line(tmp_path):
    rows = [["a", "1", "3"], ["b", "2", "1"], ["a", "99", "1"], ["a", "2", "2"]]
    with pytest.raises(InputError, match=r"g.inter:4: item '99' is not in the catalogue"):
        prepared(
            recbole,
            *write_games(tmp_path, [EVENT_HEADER, *rows]),
            "--out",
            tmp_path / "out",
            *SMALL,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Users, splits, negatives, writing


def test_split_sizes_are_ten_to_one_to_one():
    assert split_sizes(12000) == {"train": 10000, "val": 1000, "test": 1000}
    assert split_sizes(3) == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(InputError, match="2 users left, at least 3 are needed"):
        split_sizes(2)
    assert split_sizes(35) == {"train": 31, "val": 2, "test": 2}


def test_the_choice_of_users_depends_on_the_seed_and_not_on_their_order():
    sessions = [Session(["f:1"], f"u{n}", ["a"], "b") for n in range(200)]
    chosen = choose(iter(sessions), 50, 0)
    assert [s.user for s in chosen[:4]] == [s.user for s in choose(reversed(sessions), 4, 0)]
    assert len({s.user for s in chosen}) == 50
    assert {s.user for s in chosen} != {s.user for s in choose(sessions, 50, 1)}
    by_hash = sorted(range(200), key=lambda n: hashlib.sha256(f"0\0u{n}".encode()).digest())
    assert [s.user for s in chosen] == [f"u{n}" for n in by_hash[:50]]


def test_negatives_are_new_distinct_and_uniform():
    items = [f"i{n}" for n in range(10)]
    counts = Counter()
    for user in range(4000):
        session = Session([""], str(user), ["i0", "i1", "i0"], "i2")
        drawn = draw_negatives(0, session, items, range(1, 11), 3)
        assert len(set(drawn)) == 3
        counts.update(drawn)
    assert set(counts) == set(items[3:])
    assert all(abs(n / 12000 - 1 / 7) < 0.015 for n in counts.values())
    session = Session([""], "u", ["i0"], "i2")
    assert draw_negatives(0, session, items, range(1, 11), 3) == draw_negatives(
        0, session, items, range(1, 11), 3
    )
    assert sorted(draw_negatives(0, session, items, range(1, 11), 8)) == ["i1", *items[3:]]
    with pytest.raises(InputError, match=r"user 'u': only 8 items can be negatives, 9 are needed"):
        draw_negatives(0, session, items, range(1, 11), 9)


def test_popular_negatives_follow_how_often_items_were_chosen():
    # Of 6000 users 3600 chose w, 1200 x and 1200 y; nobody chose z.
    chosen = ["w"] * 6 + ["x", "x", "y", "y"]
    sessions = [Session([""], f"u{n}", [chosen[n % 10], f"h{n}"], f"t{n}") for n in range(6000)]
    known = dict.fromkeys(
        ["z", "w", "x", "y", *(f"{kind}{n}" for n in range(6000) for kind in "ht")], True
    )
    args = Namespace(seed=0, negatives="popular", train_negatives=1, eval_negatives=1)
    splits = make_splits(sessions, known, args)
    of_y = Counter(e["negatives"][0] for e in splits["train"] if e["history"][0] == "y")
    n = of_y.total()
    # For users of y: 18,000 choices, less 1200 of y and the user's own two others; 12,000 items were chosen once.
    assert abs(of_y["w"] / n - 3600 / 16798) < 0.04
    assert abs(of_y["x"] / n - 1200 / 16798) < 0.025
    assert of_y["y"] == of_y["z"] == 0
    weights = list(accumulate([1, 8, 1]))
    first = Counter(
        draw_negatives(0, Session([""], str(n), [], "a"), ["a", "b", "c"], weights, 1)[0]
        for n in range(3000)
    )
    assert abs(first["b"] / 3000 - 8 / 9) < 0.02


def test_popular_negatives_from_the_command(tmp_path):
    raw = write_mind(
        tmp_path / "raw", [(f"u{n}", f"N{n % 3} N3 N{4 + n % 2}", "") for n in range(24)], n_news=30
    )
    arguments = [*SMALL, "--negatives", "popular"]
    out = prepared(mind, "--raw", raw, "--out", tmp_path / "out", *arguments)
    assert {i for e in examples(out).values() for i in e["negatives"]} == {
        "N0",
        "N1",
        "N2",
        "N4",
        "N5",
    }
    assert [item["id"] for item in read(out, "items")] == ["N0", "N1", "N2", "N3", "N4", "N5"]


@pytest.mark.parametrize("negatives", ["uniform", "popular"])
def test_reruns_are_byte_identical_and_seeds_differ(tmp_path, negatives):
    raw = write_amazon(tmp_path / "raw", 400, 300)
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ["--users", "24", "--negatives", negatives, "--seed", seed]
        out = prepared(amazon_m2, "--raw", raw, "--out", tmp_path / name, *arguments)
        contents.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert sorted(contents[0]) == [
        "items.jsonl",
        "meta.json",
        "test.jsonl",
        "train.jsonl",
        "val.jsonl",
    ]
    assert contents[0] == contents[1]
    assert contents[0]["train.jsonl"] != contents[2]["train.jsonl"]
    assert str(tmp_path) not in contents[0]["meta.json"].decode()


def test_what_is_written_loads(tmp_path):
    raw = write_amazon(tmp_path / "raw", 400, 300)
    out = prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out", "--locale", "DE")
    _, items, loaded = load_dataset(out, SPLITS)
    assert {split: len(e) for split, e in loaded.items()} == meta(out)["examples"]
    assert {len(e.negatives) for e in loaded["train"]} == {1}
    assert {len(e.negatives) for e in loaded["val"] + loaded["test"]} == {20}
    every = [e for split in SPLITS for e in loaded[split]]
    assert not any({*e.negatives} & {*e.history, e.positive} for e in every)
    assert set(items) == {i for e in every for i in [*e.history, e.positive, *e.negatives]}
    assert len(items) == meta(out)["items"]
    assert items["B000000001"].startswith(
        'Title: Jug "1" large; Price: 9.5; Brand: Acme; Size: 1 l; Material: Tin; Desc'
    )


def test_save_dataset_writes_meta_last(tmp_path):
    example = {"user": "ü", "history": ["a", "b"], "positive": "c", "negatives": ["d"]}
    (tmp_path / "meta.json").write_text("old")

    def items():
        assert not (tmp_path / "meta.json").exists()
        yield {"id": "a", "attributes": {"Title": "é\n"}}
        yield {"id": "b", "attributes": {"Title": "x", "Brand": "y"}}

    saved = save_dataset(
        tmp_path, {"train": [example], "val": [], "test": []}, items(), {"domain": "news"}
    )
    assert saved == {
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
    assert (
        (tmp_path / "items.jsonl")
        .read_text("utf-8")
        .startswith('{"id": "a", "attributes": {"Title": "é\\n"}}\n')
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names file, line and what was expected

GOOD = [(user, "N0 N1 N2", "N3-1 N4-0 N5-0") for user in "abc"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("news.tsv", None, r"news.tsv: no such file"),
        ("behaviors.tsv", None, r"behaviors.tsv: no such file"),
        ("news.tsv", lambda b: b"", r"news.tsv: no item with a text in it"),
        (
            "news.tsv",
            lambda b: b + b"N99\tnews\tlo",
            r"news.tsv:13: 3 columns, expected 8 \(id, category, .*whole\?",
        ),
        ("news.tsv", lambda b: b + b.splitlines(True)[1], r"news.tsv:13: item 'N1' is there twice"),
        ("news.tsv", lambda b: b + b[2:].splitlines(True)[0], r"news.tsv:13: item '' is no id"),
        ("news.tsv", lambda b: b.replace(b"Title 3", b"Caf\xe9"), r"news.tsv:4: not UTF-8 text"),
        (
            "behaviors.tsv",
            lambda b: b[:-40],
            r"behaviors.tsv:3: 3 columns, expected 5 \(impression id, user, ",
        ),
        (
            "behaviors.tsv",
            lambda b: b"",
            r"behaviors.tsv: 0 users left, at least 3 are needed \(nothing dropped\)",
        ),
        (
            "behaviors.tsv",
            lambda b: b.replace(b"N0 N1", b"N0"),
            r"0 users left, .*\(history too short 3\); loosen",
        ),
        (
            "behaviors.tsv",
            lambda b: b"".join(b.splitlines(True)[:2]),
            r"2 users left, at least 3 are needed",
        ),
    ],
)
def test_mind_bad_input(tmp_path, name, change, message):
    raw = write_mind(tmp_path / "raw", GOOD)
    content = (raw / name).read_bytes()
    (raw / name).unlink() if change is None else (raw / name).write_bytes(change(content))
    with pytest.raises(InputError, match=message) as caught:
        prepared(mind, "--raw", raw, "--out", tmp_path / "out", *SMALL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("token", ["N5", "N5-2", "-1", "N5-"])
def test_mind_bad_impression(tmp_path, token):
    raw = write_mind(tmp_path / "raw", [*GOOD, ("d", "N0 N1", f"N1-0 {token}")])
    with pytest.raises(
        InputError,
        match=rf"behaviors.tsv:4: column 'impressions': '{token}' does not end in -0 or -1",
    ):
        prepared(mind, "--raw", raw, "--out", tmp_path / "out", "--target", "impressions", *SMALL)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-history", "4"], r"--min-history 4 is above --max-history 3"),
        (
            ["--eval-negatives", "10"],
            r"user '.': only 9 items can be negatives, 10 are needed; lower --train",
        ),
        (
            ["--target", "impressions", "--negatives", "popular"],
            r"--negatives popular has no use with --target impr",
        ),
        (["--users", "2"], r"2 users left, at least 3 are needed \(users beyond --users 1\)"),
    ],
)
def test_flags_that_cannot_be(tmp_path, flags, message):
    raw = write_mind(tmp_path / "raw", GOOD)
    with pytest.raises(InputError, match=message):
        prepared(mind, "--raw", raw, "--out", tmp_path / "out", *SMALL, *flags)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: not a folder"):
        prepared(mind, "--raw", raw, "--out", tmp_path / "file", *SMALL)


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
        prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out", *SMALL)
    assert "\n" not in str(caught.value)


def test_amazon_without_rows(tmp_path):
    raw = amazon_rows(tmp_path / "raw", [], [])
    with pytest.raises(
        InputError, match=r"products_train.csv: no row of locale 'UK'; found no row at all"
    ):
        prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out")
    (raw / "products_train.csv").write_text("")
    with pytest.raises(
        InputError, match=r"products_train.csv:1: no column 'id'; expected .*, found an empty file"
    ):
        prepared(amazon_m2, "--raw", raw, "--out", tmp_path / "out")


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
        prepared(recbole, *write_games(tmp_path, inter, item), "--out", tmp_path / "out", *SMALL)


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "prepare.mind",
        "--raw",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"mind: {tmp_path}/news.tsv: no such file\n"


# ---------------------------------------------------------------------------------------------------------------------
# Real data


@needs_shared
def test_real_mind(tmp_path):
    out = prepared(mind, "--raw", SHARED / "data/mind", "--out", tmp_path / "out", "--drop-unknown")
    assert meta(out)["examples"] == {"train": 1160, "val": 115, "test": 115}
    assert list(meta(out)["dropped"].values()) == [363, 32337, 0, 1910, 1315, 22, 0]
    assert [source["rows"] for source in meta(out)["sources"]] == [8241, 5000]
    assert meta(out)["mean_history"] == 16.31
    with pytest.raises(InputError, match=r"behaviors.tsv:1: item 'N27288' is not in the catalogue"):
        prepared(mind, "--raw", SHARED / "data/mind", "--out", tmp_path / "out")


@needs_shared
def test_real_games(tmp_path):
    folder = SHARED / "data/games"
    arguments = [
        "--inter",
        folder / "games.inter",
        "--item",
        folder / "games.item",
        "--domain",
        "products",
    ]
    out = prepared(recbole, *arguments, "--out", tmp_path / "out")
    assert meta(out)["examples"] == {"train": 3490, "val": 349, "test": 349}
    assert list(meta(out)["dropped"].values()) == [0, 0, 0, 20381, 704, 0, 0]
    items = (out / "items.jsonl").read_text("utf-8")
    assert "&amp;" not in items
    assert (
        '{"id": "11", "attributes": {"Title": "Phantasy Star Online, Episode I & II"}}\n' in items
    )
    _, texts, loaded = load_dataset(out, SPLITS)
    assert len(texts) == meta(out)["items"] == 15678
    assert all(10 <= len(e.history) <= 25 for split in SPLITS for e in loaded[split])
