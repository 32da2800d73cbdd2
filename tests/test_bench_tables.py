"""bench/tables.py: its tables have every fault, and prepare.table finds what a slow count finds."""

import csv
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from math import ceil
from pathlib import Path

import pytest
from helpers import ROOT, examples, meta, read_lines

from bench.tables import Shape, is_made, make_tables

# TABLES=FOLDER checks what python -m bench.tables has left there, which takes longer.
FOLDER, ROWS = os.environ.get("TABLES"), 40_000
MISSING = {"", "NaN"}  # as bench/tables.py writes them
LOW, HIGH = 10, 25  # the default bounds of a history


def bench(folder, *flags):
    line = [sys.executable, "-m", "bench.tables", "--folder", str(folder), *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tables, and a dataset of each split."""
    if FOLDER:
        return Path(FOLDER)
    made = tmp_path_factory.mktemp("tables")
    said = bench(made, "--rows", str(ROWS), "--items", "3000", "--splits", "last", "time")
    figures = [line.split() for line in said.splitlines()[-2:]]
    assert [row[0] for row in figures] == ["last", "time"]
    assert all(0.01 < float(row[3]) < 1 for row in figures)  # GB
    return made


def histories(folder):
    """Each user's [time, item] in order, and counts of what was left out."""
    with open(folder / "items.csv", newline="", encoding="utf-8") as file:
        ids = [row["item_id"] for row in csv.DictReader(file)]
    found, counts = defaultdict(list), Counter({"twice": len(ids) - len(set(ids))})
    with open(folder / "interactions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if MISSING & {row["item_id"], row["timestamp"]}:
                counts["missing"] += 1
            else:  # the times are ISO 8601 with one form, so their texts have the same order
                found[row["user_id"]].append([row["timestamp"], row["item_id"]])

    known, times = set(ids), []
    for user, rows in found.items():
        rows.sort(key=lambda row: row[0])
        seen: dict[str, list[str]] = {}
        for row in rows:
            seen.setdefault(row[1], row)
        first = [*seen.values()]
        counts["repeats"] += len(rows) - len(first)
        times += [time for time, _ in first]
        found[user] = [row for row in first if row[1] in known]
        counts["unknown"] += len(first) - len(found[user])
    times.sort()
    moments = [times[ceil(len(times) * tenths / 10) - 1] for tenths in (8, 9)]
    return found, counts, moments


def told(out):
    dropped = meta(out)["dropped"]
    names = {
        "twice": "rows of an item that is there already",
        "missing": "interactions with a missing value",
        "repeats": "repeats of an item of the same user",
        "unknown": "unknown ids in histories",
    }
    return {short: dropped[name] for short, name in names.items()}, dropped


def test_the_last_item_of_every_user_is_the_target_as_a_slow_count_finds(folder):
    found, counts, _ = histories(folder)
    out = folder / "last"
    counted, dropped = told(out)
    assert counted == dict(counts)
    assert all(counts.values())

    whole = {user: [item for _, item in rows] for user, rows in found.items()}
    passing = {user: items for user, items in whole.items() if len(items) > LOW}
    kept = examples(out)
    assert len(passing) == len(kept) + dropped["users beyond --users"]
    assert dropped["history too short"] == len(whole) - len(passing)
    for user, example in kept.items():
        *history, target = passing[user]
        assert (example["history"], example["positive"]) == (history[-HIGH:], target)
        assert not {*example["negatives"]} & {*whole[user]}


def test_two_moments_divide_the_users_as_a_slow_count_finds(folder):
    found, counts, moments = histories(folder)
    out = folder / "time"
    counted, dropped = told(out)
    assert counted == dict(counts)
    assert [moment["iso"] for moment in meta(out)["moments"]] == moments

    bounds = {"train": ("", moments[0]), "val": tuple(moments), "test": (moments[1], "9")}
    passing = {}
    for split, (after, until) in bounds.items():
        for user, rows in found.items():
            before = [row for row in rows if row[0] <= until]
            if len(before) > LOW and before[-1][0] > after:
                passing[split, user] = [item for _, item in before]
    kept = 0
    for split in bounds:
        for example in read_lines(out / f"{split}.jsonl"):
            *history, target = passing[split, example["user"]]
            assert (example["history"], example["positive"]) == (history[-HIGH:], target)
            kept += 1
    left_out = dropped["users beyond --users"] + dropped["users beyond the sizes of their splits"]
    assert len({user for _, user in passing}) == kept + left_out


def test_tables_are_made_from_the_seed_and_used_again(tmp_path):
    shapes = [Shape(600, 50, 60, times, seed) for times, seed in (("iso", 0), ("numbers", 1))]
    made = {}
    for n, shape in enumerate([shapes[0], *shapes]):
        make_tables(shape, tmp_path / f"{n}")
        made[n] = (tmp_path / f"{n}" / "interactions.csv").read_text()
        assert is_made(shape, tmp_path / f"{n}")
    assert made[0] == made[1]
    assert not is_made(shapes[0], tmp_path / "2")
    rows = made[2].splitlines()
    assert rows[0] == "user_id,item_id,rating,timestamp"
    assert len(rows) == 601
    assert sum(bool(re.fullmatch(r"A\w+,B\w+,\d\.0,1\d{9}", row)) for row in rows) > 590
