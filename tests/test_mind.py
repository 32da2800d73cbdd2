"""prepare/mind.py: a user's first row, its impressions, and every bad input in one line."""

import hashlib
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import SHARED, needs_shared
from helpers import ROOT, SMALL, examples, flags, meta, prepared, read_lines, write_mind

from prepare import mind
from prepare.domains import DOMAINS
from trsr import InputError


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
    out = prepared(mind, raw=raw, out=tmp_path / "out", **SMALL)
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
    raw = write_mind(tmp_path / "raw", behaviors, n_news=3, news=news)
    settings = SMALL | {"eval_negatives": 1}
    out = prepared(mind, raw=raw, out=tmp_path / "out", target="history", **settings)
    items = read_lines(out / "items.jsonl")
    written = [i for i in ("N0", "N1", "N2", "N12", "N13") if i in str(examples(out))]
    assert [item["id"] for item in items] == written
    texts = {"Category": "news", "SubCategory": "local", "Title": "Title 0", "Abstract": "About 0"}
    assert items[0] == {"id": "N0", "attributes": texts}
    food = next(item for item in items if item["id"] == "N12")
    assert food["attributes"] == {"Category": "food", "Title": "Fish & chips <3"}


def test_mind_meta_is_whole_and_has_no_paths(tmp_path):
    raw = write_mind(tmp_path / "raw", [(f"u{n}", "N0 N1 N2", "") for n in range(30)])
    out = prepared(mind, raw=raw, out=tmp_path / "out", **SMALL, users=24, seed=7)
    n_items = len(read_lines(out / "items.jsonl"))
    sources = []
    for name, rows in (("news.tsv", 12), ("behaviors.tsv", 30)):
        digest = hashlib.sha256((raw / name).read_bytes()).hexdigest()
        sources.append({"file": name, "sha256": digest, "rows": rows})
    settings = (
        SMALL
        | {"users": 24, "drop_unknown": False, "train_negatives": 1}
        | dict.fromkeys(("val_users", "test_users"))
    )
    settings |= {"negatives": "uniform", "target": "history", "long": "drop"}
    dropped = dict.fromkeys(meta(out)["dropped"], 0) | {"users beyond --users": 6}
    assert meta(out) == {
        "made_by": "prepare.mind",
        "domain": "news",
        "words": asdict(DOMAINS["news"]),
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
    message = r"behaviors.tsv:1: item 'N77' is not in the catalogue; --drop-unknown drops"
    with pytest.raises(InputError, match=message):
        prepared(mind, raw=raw, out=tmp_path / "no", **SMALL)
    assert not (tmp_path / "no").exists()
    out = prepared(mind, raw=raw, out=tmp_path / "out", **SMALL, drop_unknown=True)
    for example in examples(out).values():
        assert (example["history"], example["positive"]) == (["N0", "N1"], "N2")
    dropped = meta(out)["dropped"]
    assert (dropped["unknown ids in histories"], dropped["history too short"]) == (10, 1)


def test_an_item_without_text_is_like_an_unknown_one(tmp_path):
    news = [["N20", "", "", " ", "", "", "[]", "[]"]]
    raw = write_mind(tmp_path / "raw", [("a", "N20 N0 N1", "")], news=news)
    message = r"behaviors.tsv:1: item 'N20' has no text in the catalogue; --drop-unknown"
    with pytest.raises(InputError, match=message):
        prepared(mind, raw=raw, out=tmp_path / "out", **SMALL)


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
    settings = SMALL | {"eval_negatives": 3, "train_negatives": 3, "target": "impressions"}
    out = prepared(mind, raw=raw, out=tmp_path / "out", **settings)
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


# ---- Bad input


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
        prepared(mind, raw=raw, out=tmp_path / "out", **SMALL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("token", ["N5", "N5-2", "-1", "N5-"])
def test_mind_bad_impression(tmp_path, token):
    raw = write_mind(tmp_path / "raw", [*GOOD, ("d", "N0 N1", f"N1-0 {token}")])
    message = rf"behaviors.tsv:4: column 'impressions': '{token}' does not end in -0 or -1"
    with pytest.raises(InputError, match=message):
        prepared(mind, raw=raw, out=tmp_path / "out", target="impressions", **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_history": 4}, r"--min-history 4 is above --max-history 3"),
        (
            {"eval_negatives": 10},
            r"user '.': only 9 items can be negatives, 10 are needed; lower --train",
        ),
        (
            {"target": "impressions", "negatives": "popular"},
            r"--negatives popular has no use with --target impr",
        ),
        ({"users": 2}, r"2 users left, at least 3 are needed \(users beyond --users 1\)"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, settings, message):
    raw = write_mind(tmp_path / "raw", GOOD)
    with pytest.raises(InputError, match=message):
        prepared(mind, raw=raw, out=tmp_path / "out", **SMALL | settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: not a folder"):
        prepared(mind, raw=raw, out=tmp_path / "file", **SMALL)


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    line = [sys.executable, "-m", "prepare.mind", *flags(raw=tmp_path, out=tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"mind: {tmp_path}/news.tsv: no such file\n"


# ---- Real data


@needs_shared
def test_real_mind(tmp_path):
    out = prepared(mind, raw=SHARED / "data/mind", out=tmp_path / "out", drop_unknown=True)
    assert meta(out)["examples"] == {"train": 1160, "val": 115, "test": 115}
    assert list(meta(out)["dropped"].values()) == [363, 32337, 0, 1910, 1315, 22, 0]
    assert [source["rows"] for source in meta(out)["sources"]] == [8241, 5000]
    assert meta(out)["mean_history"] == 16.31
    with pytest.raises(InputError, match=r"behaviors.tsv:1: item 'N27288' is not in the catalogue"):
        prepared(mind, raw=SHARED / "data/mind", out=tmp_path / "out")


def test_a_header_line_is_passed_over_and_told(tmp_path, capsys):
    users = [(f"U{n}", f"N{n} N{n + 1} N{n + 2}", "") for n in range(4)]
    write_mind(tmp_path / "plain", users)
    write_mind(tmp_path / "headed", users)
    for name, header in (
        ("news.tsv", "news_id\tcategory\tsubcategory\ttitle\tabstract\turl\ta\tb"),
        ("behaviors.tsv", "impression_id\tuser_id\ttime\thistory\timpressions"),
    ):
        path = tmp_path / "headed" / name
        path.write_text(f"{header}\n{path.read_text('utf-8')}", "utf-8")
    for name in ("plain", "headed"):
        prepared(mind, raw=tmp_path / name, out=tmp_path / f"out-{name}", **SMALL)
    assert capsys.readouterr().out.count(":1: a header line, passed over") == 2
    for name in ("items.jsonl", "train.jsonl", "val.jsonl", "test.jsonl"):
        texts = [(tmp_path / f"out-{kind}" / name).read_text() for kind in ("plain", "headed")]
        assert texts[0] == texts[1]
