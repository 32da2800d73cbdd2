"""prepare/table.py: own tables in every form, faults that are counted or named, splits by time."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from helpers import ROOT, SMALL, SPLITS, examples, flags, meta, prepared, read_lines

from prepare import table
from prepare.common import Options, Session, reason_to_drop
from prepare.dataset import load_dataset
from prepare.rows import open_rows
from trsr import InputError

USERS, ITEMS = 12, 14


def write_csv(path, rows, separator=","):
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows), "utf-8")
    return path


def interactions(users=USERS, n=4, seed=0):
    """Return (user, item, time) rows of n distinct items per user, in a random order."""
    rng = random.Random(seed)
    rows = [
        (f"u{u}", f"i{i}", 1_500_000_000 + rng.randrange(10**6))
        for u in range(users)
        for i in rng.sample(range(ITEMS), n)
    ]
    rng.shuffle(rows)
    return rows


def items(n=ITEMS):
    return [(f"i{i}", f"Film {i}", "drama" if i % 2 else "comedy") for i in range(n)]


HEADERS = ("user_id", "item_id", "timestamp"), ("item_id", "title", "genres")


def write_tables(folder, rows=None, films=None, headers=HEADERS):
    """Write the two tables as CSV; return the settings that name them."""
    rows, films = interactions() if rows is None else rows, items() if films is None else films
    write_csv(folder / "ratings.csv", [headers[0], *rows])
    write_csv(folder / "films.csv", [headers[1], *films])
    return {
        "interactions": folder / "ratings.csv",
        "items": folder / "films.csv",
        "domain": "products",
        "out": folder / "out",
        **SMALL,
    }


def contents(out):
    return {name: (out / f"{name}.jsonl").read_bytes() for name in ("items", *SPLITS)}


# ---- The forms


def as_json_lines(rows, header):
    return "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows)


def write_form(path, form, rows, header):
    """Write rows in a form; return the file's path."""
    path = path.with_name(f"{path.name}.{form}")
    kind = form.removesuffix(".gz")
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        columns = {name: [row[n] for row in rows] for n, name in enumerate(header)}
        arrow.parquet.write_table(arrow.table(columns), path)
        return path
    text = as_json_lines(rows, header)
    if kind != "jsonl":
        separator = {"csv": ",", "tsv": "\t"}[kind]
        text = "".join(separator.join(map(str, row)) + "\n" for row in [header, *rows])
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if form.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("form", ["tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_every_form_of_the_same_tables_makes_the_same_dataset(tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow.parquet")
    settings = write_tables(tmp_path)
    expected = contents(prepared(table, **settings))
    settings |= {
        "interactions": write_form(tmp_path / "r", form, interactions(), HEADERS[0]),
        "items": write_form(tmp_path / "f", form, items(), HEADERS[1]),
        "out": tmp_path / "other",
    }
    assert contents(prepared(table, **settings)) == expected
    assert meta(tmp_path / "other")["sources"][1]["rows"] == USERS * 4


def test_the_last_item_is_the_target_and_the_text_is_what_was_asked_for(tmp_path, capsys):
    rows = [("a", "i1", 30), ("a", "i2", 10), ("a", "i3", 20)]
    rows += [(u, f"i{n}", "7") for u in "bc" for n in (4, 5, 6)]  # at once: the file's order
    out = prepared(table, **write_tables(tmp_path, rows))
    found = {user: (e["history"], e["positive"]) for user, e in examples(out).items()}
    assert found == {
        "a": (["i2", "i3"], "i1"),
        "b": (["i4", "i5"], "i6"),
        "c": (["i4", "i5"], "i6"),
    }
    shown = {item["id"]: item["attributes"] for item in read_lines(out / "items.jsonl")}
    assert shown["i1"] == {"Title": "Film 1", "Genres": "drama"}
    printed = capsys.readouterr().out
    assert "columns user=user_id item=item_id time=timestamp of ratings.csv\n" in printed
    assert "columns item=item_id text=title,genres of films.csv\n" in printed
    prepared(table, **write_tables(tmp_path, rows), text=["genres", "title"])
    shown = {item["id"]: item["attributes"] for item in read_lines(out / "items.jsonl")}
    assert list(shown["i1"].items()) == [("Genres", "drama"), ("Title", "Film 1")]
    columns = {"user": "user_id", "item": "item_id", "time": "timestamp", "id": "item_id"}
    assert meta(out)["columns"] == columns | {"text": ["genres", "title"]}


def test_columns_are_named_or_guessed_from_their_usual_names(tmp_path, capsys):
    expected = contents(prepared(table, **write_tables(tmp_path)))
    headers = ("reviewerID", "asin", "unixReviewTime"), ("asin", "title", "genres")
    assert contents(prepared(table, **write_tables(tmp_path, headers=headers))) == expected
    assert "user=reviewerID item=asin time=unixReviewTime" in capsys.readouterr().out
    headers = (
        ("user_id:token", "item_id:token", "timestamp:float"),
        (
            "item_id:token",
            "title:token_seq",
            "genres:token_seq",
        ),
    )
    assert contents(prepared(table, **write_tables(tmp_path, headers=headers))) == expected
    headers = ("who", "what", "when"), ("key", "title", "genres")
    named = {"user": "who", "item": "what", "time": "when", "id": "key"}
    assert contents(prepared(table, **write_tables(tmp_path, headers=headers), **named)) == expected


def test_text_all_takes_every_column_but_the_id(tmp_path, capsys):
    films = [(*film, n, "x") for n, film in enumerate(items())]
    settings = write_tables(
        tmp_path, films=films, headers=(HEADERS[0], (*HEADERS[1], "year_made", "zz"))
    )
    prepared(table, **settings)
    left = "Left out of the items' texts: year_made, zz; --text takes them"
    assert left in capsys.readouterr().out
    out = prepared(table, **settings, text=["all"])
    first = read_lines(out / "items.jsonl")[0]["attributes"]
    assert first == {"Title": "Film 0", "Genres": "comedy", "Year made": "0", "Zz": "x"}


def test_json_values_become_texts(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": ["x", ["y", null]], "b": 1.50, "c": 12345678901234567890}\n\n{"a": NaN}')
    rows = list(open_rows(path).read(["a", "b", "c"]))
    assert rows == [(1, ["x, y", "1.50", "12345678901234567890"]), (3, ["NaN", "", ""])]


def test_parquet_times_and_whole_floats_are_exact(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    nanoseconds = [1_500_000_000_000_000_001, None]
    columns = {
        "t": arrow.array(nanoseconds, arrow.timestamp("ns", "UTC")),
        "f": arrow.array([12.0, None]),
        "i": arrow.array([2.0**53 - 1, 2.0**53]),
        "s": arrow.array(["a", None]).dictionary_encode(),
        "l": arrow.array([["x", "y"], []]),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
    rows = list(open_rows(tmp_path / "x.parquet").read(["l", "t", "f", "s", "i"]))
    assert rows == [
        (1, ["x, y", "2017-07-14 02:40:00.000000001Z", "12", "a", "9007199254740991"]),
        (2, ["", "", "", "", "9007199254740992.0"]),  # of several whole numbers
    ]


def test_a_dataset_of_a_table_loads(tmp_path):
    _, texts, loaded = load_dataset(prepared(table, **write_tables(tmp_path)), SPLITS)
    assert sum(map(len, loaded.values())) == USERS
    assert texts["i1"] == "Title: Film 1; Genres: drama"


# ---- Faults that are counted


def test_missing_values_are_refused_or_dropped_and_counted(tmp_path, capsys):
    rows = [*interactions(), ("NaN", "i1", "5"), ("u1", "", "5"), ("u1", "i1", "null")]
    films = [("None", "Nothing", "x"), *items()]
    settings = write_tables(tmp_path, rows)
    with pytest.raises(InputError, match=r"ratings\.csv:50: column 'user_id' has no value; --miss"):
        prepared(table, **settings)
    expected = contents(prepared(table, **write_tables(tmp_path)))
    settings = write_tables(tmp_path, rows, films)
    with pytest.raises(InputError, match=r"films\.csv:2: column 'item_id' has no value; --missing"):
        prepared(table, **settings)
    assert contents(prepared(table, **settings, missing="drop")) == expected
    dropped = meta(tmp_path / "out")["dropped"]
    assert dropped["interactions with a missing value"] == 3
    assert dropped["items without an id"] == 1
    assert "ratings.csv:50: column 'user_id' has no value; such rows" in capsys.readouterr().out


def test_repeats_are_kept_dropped_or_refused(tmp_path, capsys):
    rows = [(u, f"i{n}", n) for u in "abc" for n in (1, 2, 3)]
    rows.append(("a", "i1", "2"))  # line 11, between the second and the third in time
    settings = write_tables(tmp_path, rows)
    assert examples(prepared(table, **settings))["a"]["history"] == ["i1", "i2", "i1"]
    where = "ratings.csv:11: item 'i1' is there again for user 'a'"
    assert f"{where}; 1 such interactions, kept\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"{where}; --duplicates keep or drop"):
        prepared(table, **settings, duplicates="refuse")
    found = examples(prepared(table, **settings, duplicates="drop"))["a"]
    assert (found["history"], found["positive"]) == (["i1", "i2"], "i3")
    assert meta(tmp_path / "out")["dropped"]["repeats of an item of the same user"] == 1


def test_items_with_two_rows_are_refused_or_the_first_is_kept(tmp_path):
    settings = write_tables(tmp_path, films=[*items(), ("i3", "Another", "x")])
    with pytest.raises(InputError, match=r"films\.csv:16: item 'i3' is there twice; --duplicate-i"):
        prepared(table, **settings)
    out = prepared(table, **settings, duplicate_items="first")
    assert contents(out) == contents(prepared(table, **write_tables(tmp_path)))
    assert meta(out)["dropped"]["rows of an item that is there already"] == 0
    prepared(table, **write_tables(tmp_path, films=[*items(), items()[0]]), duplicate_items="first")
    assert meta(out)["dropped"]["rows of an item that is there already"] == 1


@pytest.mark.parametrize("split_time", [None, [0.6, 0.8]])
def test_unknown_ids_are_an_error_or_dropped_and_counted(tmp_path, split_time):
    rows = [*interactions(), ("u3", "ghost", 10), ("u3", "ghost", 20)]
    settings = write_tables(tmp_path, rows) | {"split_time": split_time}
    with pytest.raises(InputError, match=r"ratings\.csv:50: item 'ghost' is not in the catalogue"):
        prepared(table, **settings)
    out = prepared(table, **settings, drop_unknown=True)
    assert meta(out)["dropped"]["unknown ids in histories"] == 2
    assert "ghost" not in (out / "items.jsonl").read_text()


def test_long_histories_are_dropped_or_cut_to_their_last_items(tmp_path):
    rows = [(u, f"i{n}", n) for u in "abc" for n in range(3)]
    rows += [("long", f"i{n}", n) for n in range(7)]
    settings = write_tables(tmp_path, rows)
    assert "long" not in examples(prepared(table, **settings))
    assert meta(tmp_path / "out")["dropped"]["history too long"] == 1
    for seed in range(9):
        out = prepared(table, **settings, long="cut", seed=seed)
        found = examples(out)["long"]
        assert (found["history"], found["positive"]) == (["i3", "i4", "i5"], "i6")
        # What was cut off is known to be liked, so it is no negative.
        assert not {"i0", "i1", "i2"} & set(found["negatives"])
    cut = "items cut from the beginning of long histories"
    assert meta(out)["dropped"][cut] == 3
    assert meta(out)["dropped"]["history too long"] == 0


def test_a_target_among_the_items_that_are_cut_drops_the_user(tmp_path):
    rows = [(u, f"i{n}", n) for u in "abc" for n in range(3)]
    rows += [("long", f"i{n}", n) for n in range(7)] + [("long", "i0", 9)]
    out = prepared(table, **write_tables(tmp_path, rows), long="cut")
    assert "long" not in examples(out)
    assert meta(out)["dropped"]["target already in history"] == 1


# ---- Splits by time


def random_rows(seed):
    """Return rows with gaps, repeats and simultaneous times."""
    rng = random.Random(seed)
    return [
        (f"u{int(30 * rng.random() ** 1.5)}", f"i{rng.randrange(40)}", rng.randrange(60) + 10**9)
        for _ in range(rng.randrange(180, 260))
    ]


def oracle(rows, options, shares):
    """Return {split: {user: (history, target)}} that a user may be in, and the two moments."""
    times = sorted(time for _, _, time in rows)
    moments = [
        next(t for t in times if Fraction(sum(u <= t for u in times), len(times)) >= share)
        for share in shares
    ]
    bounds = zip(SPLITS, [-1, *moments], [*moments, 10**18], strict=True)
    found = {}
    for split, after, until in bounds:
        found[split] = {}
        for user in {user for user, _, _ in rows}:
            own = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
            within = [n for n, row in enumerate(own) if after < row[2] <= until]
            if not within:
                continue
            history = [row[1] for row in own[: within[-1]]]
            target = own[within[-1]][1]
            fits = options.min_history <= len(history) <= options.max_history
            if fits and target not in history:
                found[split][user] = (history, target)
    return found, moments


@pytest.mark.parametrize("seed", range(12))
def test_a_split_by_time_agrees_with_a_slow_oracle(tmp_path, seed):
    rows = random_rows(seed)
    films = [(f"i{n}", f"Film {n}", "x") for n in range(60)]  # 20 that nobody ever chose
    sizes = {"val_users": 1, "test_users": 2, "max_history": 12, "seed": seed}
    settings = write_tables(tmp_path, rows, films) | sizes | {"split_time": [0.7, 0.85]}
    allowed, (first, second) = oracle(
        rows, Options(min_history=2, max_history=12), (Fraction("0.7"), Fraction("0.85"))
    )
    out = prepared(table, **settings)
    found = {split: read_lines(out / f"{split}.jsonl") for split in SPLITS}

    users = [e["user"] for split in SPLITS for e in found[split]]
    assert len(set(users)) == len(users)
    assert (len(found["val"]), len(found["test"])) == (1, 2)
    # Whoever can be trained on and is not tested on is trained on.
    others = {e["user"] for split in ("val", "test") for e in found[split]}
    assert {e["user"] for e in found["train"]} == set(allowed["train"]) - others
    for split in SPLITS:
        for e in found[split]:
            assert (e["history"], e["positive"]) == allowed[split][e["user"]]

    # Of the future, not even the existence of an item is learned.
    for split, end in (("train", first), ("val", second)):
        before = {item for _, item, time in rows if time <= end}
        assert all({*e["history"], e["positive"], *e["negatives"]} <= before for e in found[split])
    told = [moment["time"] for moment in meta(out)["moments"]]
    assert told == [str(first), str(second)]
    counts = Counter(meta(out)["dropped"])
    filters = ("history too short", "history too long", "target already in history")
    eligible = set().union(*allowed.values())
    assert sum(counts[name] for name in filters) == len({row[0] for row in rows} - eligible)
    unplaced = counts["users beyond the sizes of their splits"]
    assert unplaced == len(eligible) - len(users)


def test_popular_negatives_of_training_users_count_no_later_choices(tmp_path):
    rows = [(f"t{u}", f"i{n}", n) for u in range(8) for n in range(3)]
    # Everybody's favorites of later times; without a moment they would be drawn nearly always.
    rows += [(f"l{u}", f"i{n}", n) for u in range(3) for n in range(1, 3)]
    rows += [(f"l{u}", f"i{n}", 90 + n) for u in range(3) for n in range(8, 10)]
    rows += [(f"t{u}", "i9", 80) for u in range(4)] + [("t0", "i3", 2), ("t1", "i4", 2)]
    settings = write_tables(tmp_path, rows) | {"negatives": "popular", "eval_negatives": 1}
    settings |= {"split_time": [0.75, 0.83], "test_users": 2, "val_users": 1, "max_history": 9}
    out = prepared(table, **settings)
    drawn = {i for e in read_lines(out / "train.jsonl") for i in e["negatives"]}
    assert drawn <= {"i0", "i1", "i2", "i3", "i4"}
    assert [m["time"] for m in meta(out)["moments"]] == ["2", "80"]


def test_a_split_without_users_or_time_is_named(tmp_path):
    settings = write_tables(tmp_path) | {"split_time": [0.7, 0.85]}
    with pytest.raises(InputError, match=r"ratings\.csv: \d+ users for test, 13 needed \("):
        prepared(table, **settings, test_users=13)
    rows = [(u, f"i{n}", 5) for u in "abcd" for n in range(3)]
    settings = write_tables(tmp_path, rows) | {"split_time": [0.7, 0.85]}
    with pytest.raises(InputError, match=r"--split-time 0\.7 0\.85 leaves no time for validation"):
        prepared(table, **settings)
    for shares, more, message in (
        ([0.9, 0.8], {}, "the first share must be below"),
        ([0.8, 0.9], {"split": "last"}, "exclude each other"),
    ):
        with pytest.raises(InputError, match=message):
            prepared(table, **settings | {"split_time": shares}, **more)


def test_reruns_are_byte_identical(tmp_path):
    settings = write_tables(tmp_path, random_rows(1), items(40)) | {"split_time": [0.7, 0.85]}
    first = contents(prepared(table, **settings, long="cut"))
    settings["interactions"].touch()
    assert contents(prepared(table, **settings, long="cut")) == first
    assert contents(prepared(table, **settings, long="cut", seed=1)) != first


# ---- Bad input: one line that names the file and the line


HEADER = b"user_id,item_id,timestamp\n"
SHORT_GZIP = gzip.compress(HEADER * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.csv", b"", r"r\.csv:1: the file is empty"),
        ("r.csv", b"\n\n", r"r\.csv:1: an empty line, expected the names of the columns"),
        ("r.csv", HEADER, r"r\.csv: no interactions in it"),
        (
            "r.csv",
            b"1,1193,978300760\n",
            r"r\.csv:1: no column has a usual name of a user; name it with --user \(the columns "
            r"are 1, 1193, 978300760\); does the file lack a header line",
        ),
        (
            "r.csv",
            b"user_id;item_id\na;b\n",
            r"r\.csv:1: no .* is the table separated by ';'\? Save",
        ),
        ("r.csv", b"user_id,item_id\na,b\n", r"r\.csv:1: no column has a usual name of a time"),
        ("r.csv", b"user_id,user_id,item_id\n", r"r\.csv:1: two columns of one name among user_id"),
        ("r.csv", HEADER + b"a,b,1\na,b\n", r"r\.csv:3: 2 columns, expected 3 \(user_id, item_id"),
        ("r.csv", HEADER + b'a,"b,1\n', r"r\.csv:2: not comma-separated text"),
        (
            "r.csv",
            HEADER + b"a,b,noon\n",
            r"r\.csv:2: column 'timestamp': 'noon' is neither a ",
        ),
        (
            "r.csv",
            HEADER + b"a,b,1700000000\na,c,1700000001\na,d,1700000002000\n",
            r"r\.csv:4: column 'timestamp': 1700000002000 and 1700000000 at .*r\.csv:2 differ in u",
        ),
        (
            "r.csv",
            HEADER + b"a,b,1500000000\na,c,1500000001\na,d,20170714\n",
            r"r\.csv:4: column 'timestamp': 20170714 and 1500000000 at .*r\.csv:2 differ in u",
        ),
        (
            "r.csv",
            HEADER + b"a,b,0\na,c,1500000001\n",
            r"r\.csv:2: column 'timestamp': 0 and 1500000001 at .*r\.csv:3 differ in unit",
        ),
        ("r.csv", HEADER + b"a,b,1\n" + HEADER, r"r\.csv:3: the header again, as in files that"),
        (
            "r.csv",
            HEADER + b"a,b,1\nc,b,1\na ,b,2\n",
            r"r\.csv:4: column 'user_id': user 'a ' is 'a' of .*r\.csv:2 in another spelling",
        ),
        ("r.csv", HEADER + b"1.0,b,1\n1,b,2\n", r"r\.csv:2: .* user '1\.0' is '1' of .*csv:3 in"),
        (
            "r.csv",
            HEADER + "Jose\u0301,b,1\nJos\u00e9,b,2\n".encode(),
            r"r\.csv:2: .* is 'Jos\u00e9' of .*r\.csv:3 in another spelling",
        ),
        ("r.csv", HEADER + b"a,b,1\n1.5e+17,b,2\n", r"r\.csv:3: .* 1\.5e\+17 is a rounded number"),
        (
            "r.csv",
            HEADER + b"a,9007199254740992.0,1\n",
            r"r\.csv:2: column 'item_id': 9007.* round",
        ),
        ("r.csv", HEADER + b" a,b,1\na ,b,2\n", r"r\.csv:3: .* user 'a ' is ' a' of .*csv:2 in"),
        (
            "r.csv",
            HEADER + b"a,b,3\na,b,2020-01-01\n",
            r"r\.csv:3: column 'timestamp': '2020-01-01' is ISO 8601 without a time zone, the ",
        ),
        ("r.csv", HEADER + b"a,b,9223372036854775808\n", r"r\.csv:2: .* larger than 64 bits hold"),
        ("r.csv", HEADER + b"a,\xff,1\n", r"r\.csv:2: not UTF-8 text"),
        ("r.csv", HEADER + b"a,\0,1\n", r"r\.csv:2: not text \(a zero byte\)"),
        ("r.csv.gz", b"\x1f\x8b\x08rest", r"r\.csv\.gz:1: the gzip file is broken here"),
        # Its bytes depend on the version of zlib, so they are no name of a test.
        pytest.param("r.csv.gz", SHORT_GZIP, r"r\.csv\.gz:\d+: the gzip file is br", id="cut.gz"),
        ("r.dat", HEADER, r"r\.dat: the name does not tell the form; known are \.csv, \.tsv, "),
        ("r.jsonl", b'{"user_id": 1\n', r"r\.jsonl:1: not JSON"),
        (
            "r.jsonl",
            b'{"user_id": 1, "user_id": 2}\n',
            r"r\.jsonl:1: .*field 'user_id' is there twice",
        ),
        ("r.jsonl", b"[1]\n", r"r\.jsonl:1: a list, expected one JSON object per line"),
        ("r.jsonl", b"{}\n", r"r\.jsonl:1: no JSON object with fields in the file"),
        (
            "r.jsonl",
            b'{"user_id": {"a": 1}, "item_id": 1, "timestamp": 1}\n',
            r"r\.jsonl:1: column 'user_id' holds a dict, expected a text",
        ),
        (
            "r.jsonl",
            b'{"user_id": "\\ud800", "item_id": 1, "timestamp": 1}\n',
            r"r\.jsonl:1: a text holds half of a character",
        ),
    ],
)
def test_bad_input_is_named(tmp_path, name, data, message):
    settings = write_tables(tmp_path) | {"interactions": tmp_path / name}
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        prepared(table, **settings)
    assert "\n" not in str(error.value)


def test_a_broken_parquet_file_and_one_without_pyarrow_are_named(tmp_path, monkeypatch):
    settings = write_tables(tmp_path) | {"interactions": tmp_path / "r.parquet"}
    (tmp_path / "r.parquet").write_bytes(b"PAR1 and no more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"r\.parquet: a Parquet file needs pyarrow; pip install "):
        prepared(table, **settings)
    monkeypatch.undo()
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=r"r\.parquet: not a whole Parquet file"):
        prepared(table, **settings)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"user": "who"},
            r"ratings\.csv:1: no column 'who', which --user names; the columns are",
        ),
        ({"item": "films"}, r"ratings\.csv:1: no column 'films', which --item names"),
        (
            {"id": "key"},
            r"films\.csv:1: no column 'key', which --id names; the columns are",
        ),
        ({"text": ["plot"]}, r"films\.csv:1: no column 'plot', which --text names"),
        ({"domain": "films"}, r"--domain films: neither products nor news nor a JSON file"),
        ({"items": "nowhere.csv"}, r"nowhere\.csv: no such file"),
    ],
)
def test_wrong_flags_are_named(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        prepared(table, **write_tables(tmp_path) | more)


def test_the_command_ends_with_one_line(tmp_path):
    settings = write_tables(tmp_path, [("a", "i1", "noon")])
    command = [sys.executable, "-m", "prepare.table", *flags(**settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("table: ")
    assert done.stderr.count("\n") == 1


def test_a_foreign_domain_needs_no_code(tmp_path):
    command = [sys.executable, "-m", "prepare.table", "--print-domain"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = json.loads(printed) | {"history": "Watched Films", "recommend": "Will it be watched?"}
    (tmp_path / "movies.json").write_text(json.dumps(words))
    films = [("i0", "A [watched  films] title", "x"), *items()[1:]]
    settings = write_tables(tmp_path, films=films) | {"domain": tmp_path / "movies.json"}
    out = prepared(table, **settings)
    (tmp_path / "movies.json").unlink()  # the dataset has all words itself
    domain, texts, _ = load_dataset(out, SPLITS)
    assert (domain.history, domain.recommend) == ("Watched Films", "Will it be watched?")
    assert meta(out)["domain"] == "movies"
    assert texts["i0"] == "Title: A (watched films) title; Genres: x"


def test_what_drops_a_user_is_the_same_for_cut_histories():
    session = Session([""], "u", ["a", "b", "c", "d"], "e")
    options = {"min_history": 1, "max_history": 3}
    assert reason_to_drop(session, Options(**options)) == "history too long"
    assert reason_to_drop(session, Options(**options, long="cut")) is None
