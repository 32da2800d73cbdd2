"""prepare/common.py: users, splits and negatives, whatever the raw data."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import accumulate

import pytest
from helpers import (
    ROOT,
    SMALL,
    SPLITS,
    examples,
    meta,
    prepared,
    read_lines,
    write_amazon,
    write_mind,
)

from prepare import amazon_m2, mind
from prepare.common import Options, Session, choose, draw_negatives, make_splits, split_sizes
from prepare.dataset import load_dataset
from prepare.domains import DOMAINS
from trsr import InputError


def test_split_sizes_are_ten_to_one_to_one():
    assert split_sizes(12000) == {"train": 10000, "val": 1000, "test": 1000}
    assert split_sizes(3) == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(InputError, match="2 users left, not enough for 1 to validate and 1 to"):
        split_sizes(2)
    assert split_sizes(35) == {"train": 31, "val": 2, "test": 2}


def test_split_sizes_can_be_given():
    assert split_sizes(35, test=20) == {"train": 13, "val": 2, "test": 20}
    assert split_sizes(35, 4, 30) == {"train": 1, "val": 4, "test": 30}
    with pytest.raises(InputError, match="lower --val-users and --test-users"):
        split_sizes(35, 5, 30)


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
    first, second = (draw_negatives(0, session, items, range(1, 11), 3) for _ in range(2))
    assert first == second
    assert sorted(draw_negatives(0, session, items, range(1, 11), 8)) == ["i1", *items[3:]]
    with pytest.raises(InputError, match=r"user 'u': only 8 items can be negatives, 9 are needed"):
        draw_negatives(0, session, items, range(1, 11), 9)


def test_popular_negatives_follow_how_often_items_were_chosen():
    # Of 6000 users 3600 chose w, 1200 x and 1200 y; nobody chose z.
    chosen = ["w"] * 6 + ["x", "x", "y", "y"]
    sessions = [Session([""], f"u{n}", [chosen[n % 10], f"h{n}"], f"t{n}") for n in range(6000)]
    named = [f"{kind}{n}" for n in range(6000) for kind in "ht"]
    known = dict.fromkeys(["z", "w", "x", "y", *named], True)
    args = Options(seed=0, negatives="popular", train_negatives=1, eval_negatives=1)
    splits = make_splits({"train": sessions, "val": [], "test": []}, known, args)
    of_y = Counter(e["negatives"][0] for e in splits["train"] if e["history"][0] == "y")
    n = of_y.total()
    # For users of y: 18,000 choices, less 1200 of y and the user's own two others; 12,000 items
    # were chosen once.
    assert abs(of_y["w"] / n - 3600 / 16798) < 0.04
    assert abs(of_y["x"] / n - 1200 / 16798) < 0.025
    assert of_y["y"] == of_y["z"] == 0
    weights = list(accumulate([1, 8, 1]))
    first = Counter()
    for n in range(3000):
        session = Session([""], str(n), [], "a")
        first.update(draw_negatives(0, session, ["a", "b", "c"], weights, 1))
    assert abs(first["b"] / 3000 - 8 / 9) < 0.02


def test_popular_negatives_from_the_command(tmp_path):
    behaviors = [(f"u{n}", f"N{n % 3} N3 N{4 + n % 2}", "") for n in range(24)]
    raw = write_mind(tmp_path / "raw", behaviors, n_news=30)
    out = prepared(mind, raw=raw, out=tmp_path / "out", **SMALL, negatives="popular")
    drawn = {i for e in examples(out).values() for i in e["negatives"]}
    assert drawn == {"N0", "N1", "N2", "N4", "N5"}
    written = [item["id"] for item in read_lines(out / "items.jsonl")]
    assert written == ["N0", "N1", "N2", "N3", "N4", "N5"]


@pytest.mark.parametrize("negatives", ["uniform", "popular"])
def test_reruns_are_byte_identical_and_seeds_differ(tmp_path, negatives):
    raw = write_amazon(tmp_path / "raw", 400, 300)
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = {"users": 24, "negatives": negatives, "seed": seed}
        out = prepared(amazon_m2, raw=raw, out=tmp_path / name, **settings)
        contents.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    names = ["items.jsonl", "meta.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    assert sorted(contents[0]) == names
    assert contents[0] == contents[1]
    assert contents[0]["train.jsonl"] != contents[2]["train.jsonl"]
    assert str(tmp_path) not in contents[0]["meta.json"].decode()


def test_what_is_written_loads(tmp_path):
    raw = write_amazon(tmp_path / "raw", 400, 300)
    out = prepared(amazon_m2, raw=raw, out=tmp_path / "out", locale="DE")
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


def test_the_package_lists_every_command_of_its_own():
    command = [sys.executable, "-m", "prepare"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = [p for p in (ROOT / "prepare").glob("*.py") if "run_main(main)" in p.read_text()]
    assert len(scripts) >= 6
    assert all(f"python -m prepare.{path.stem} " in shown for path in scripts)
    assert all(word in shown for word in ("Tab-separated", "user_id:token", "timestamp:float"))


@pytest.mark.parametrize("module", [mind, amazon_m2])
def test_readers_of_one_kind_of_item_take_another_domain_too(tmp_path, module):
    if module is mind:
        behaviors = [(f"u{n}", "N1 N2 N3", "") for n in range(3)]
        settings = {"raw": write_mind(tmp_path / "raw", behaviors), **SMALL}
    else:
        settings = {"raw": write_amazon(tmp_path / "raw", 400, 300)}
    words = asdict(DOMAINS["news"]) | {"history": "Watched Films"}
    (tmp_path / "movies.json").write_text(json.dumps(words))
    out = prepared(module, **settings, out=tmp_path / "out", domain=tmp_path / "movies.json")
    assert (meta(out)["domain"], meta(out)["words"]) == ("movies", words)
    assert load_dataset(out, SPLITS)[0].history == "Watched Films"
    assert str(tmp_path) not in (out / "meta.json").read_text()
