"""Measure prepare.table on large tables: time, CPU time and peak memory.

    python -m bench.tables                                        # 2 million interactions
    python -m bench.tables --rows 20000000 --items 1500000 --splits last time

The tables are generated from the seed, as CSV: users and items by power laws, rows in random
order, item texts of about 200 characters, and a few of every fault that prepare.table can drop:
repeats, missing values, items with two rows, unknown items. They stay in the folder and are used
again. Each measurement is one process of prepare.table, which drops these faults and cuts long
histories.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from launch.command import option, parse_settings, run_main
from launch.numbers import positive, seed_number
from trsr import InputError

CHUNK = 500_000  # rows in memory
SKEWS = 2, 3  # of users and items: the place x of (0, 1) becomes number n * x**skew
START, YEARS = 1_262_304_000, 10  # the times begin with 2010
REPEATED, UNKNOWN, MISSING, TWICE = 5e-3, 1e-4, 1e-4, 1e-3  # shares of the rows, and of the items
WORDS = 4_000  # different ones in the items' texts
TEXT = (6, 14)  # words of a title, and of a description
SPLITS = {"last": ["--split", "last"], "time": ["--split-time", "0.8", "0.9"]}
DROP = {"--missing": "drop", "--duplicates": "drop", "--duplicate-items": "first", "--long": "cut"}


@dataclass(frozen=True)
class Shape:
    """What determines the tables."""

    rows: int
    items: int
    users: int
    times: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """The flags."""

    rows: int = option(2_000_000, "interactions", positive, group="tables")
    items: int = option(150_000, "items", positive)
    users: int | None = option(None, "users (unset: one for every ten interactions)", positive)
    times: str = option("iso", "how times are written", choices=("iso", "numbers"))
    seed: int = option(0, "of the tables", seed_number)
    folder: Path = option(Path("data/tables"), "where the tables are, and the datasets", Path)
    splits: tuple[str, ...] = option(
        ("last",), "splits to measure", choices=tuple(SPLITS), nargs="+", group="measurements"
    )

    @property
    def shape(self) -> Shape:
        """What determines the tables."""
        users = self.users or max(1, self.rows // 10)
        return Shape(self.rows, self.items, users, self.times, self.seed)


# ---- The tables


def name(letter: str, number: int) -> str:
    """Return the id of a user or an item: distinct, and not in the order of the numbers."""
    return f"{letter}{number * 0x9E3779B1 % 2**36:09X}"


def item_rows(shape: Shape) -> Iterator[str]:
    """Yield the lines of the table of items, header included; some items have two rows."""
    rng = np.random.default_rng([shape.seed, 1])
    yield "item_id,title,brand,category,description\n"
    letters = "bcdfghklmnprstvaeiouaeiou"
    words = ["".join(rng.choice(list(letters), rng.integers(3, 12))) for _ in range(WORDS)]
    for start in range(0, shape.items, CHUNK // 10):
        numbers = range(start, min(start + CHUNK // 10, shape.items))
        drawn = (WORDS * rng.random((len(numbers), 2 + sum(TEXT))) ** 2).astype(int).tolist()
        twice = rng.random(len(numbers)) < TWICE
        for number, picked, again in zip(numbers, drawn, twice, strict=True):
            brand, category, *rest = [words[n] for n in picked]
            title, description = " ".join(rest[: TEXT[0]]), " ".join(rest[TEXT[0] :])
            text = f'"The ""{title}"", {brand} &amp; co"' if number % 7 == 0 else title.title()
            line = f'{name("B", number)},{text},{brand.upper()},{category},"{description}, new."\n'
            yield line * 2 if again else line


def interaction_rows(shape: Shape) -> Iterator[str]:
    """Yield the lines of the table of interactions, header included, many at a time."""
    rng = np.random.default_rng([shape.seed, 2])
    yield "user_id,item_id,rating,timestamp\n"
    users = [name("A", n) for n in range(shape.users)]
    items = [name("B", n) for n in range(shape.items)]
    unknown = name("B", shape.items)
    for start in range(0, shape.rows, CHUNK):
        size = min(CHUNK, shape.rows - start)
        drawn = [rng.random(size) ** skew for skew in SKEWS]
        columns = [
            (d * n).astype(int) for d, n in zip(drawn, (len(users), len(items)), strict=True)
        ]
        columns.append(START + rng.integers(0, YEARS * 365 * 86400, size))

        again = np.flatnonzero(rng.random(size) < REPEATED)  # copies of other rows of the chunk
        source = rng.integers(0, size, len(again))
        for column in columns:
            column[again] = column[source]
        times = columns[2].tolist()
        if shape.times == "iso":
            times = [f"{t}Z" for t in columns[2].astype("datetime64[s]").astype(str).tolist()]

        chosen = [items[n] for n in columns[1].tolist()]
        for n in np.flatnonzero(rng.random(size) < UNKNOWN).tolist():
            chosen[n] = unknown
        for n in np.flatnonzero(rng.random(size) < MISSING).tolist():
            (times if n % 2 else chosen)[n] = "" if n % 3 else "NaN"
        ratings = rng.integers(1, 6, size).tolist()
        who = [users[n] for n in columns[0].tolist()]
        rows = zip(who, chosen, ratings, times, strict=True)
        yield "".join([f"{u},{i},{r}.0,{t}\n" for u, i, r, t in rows])


def make_tables(shape: Shape, folder: Path) -> None:
    """Write items.csv and interactions.csv, and what determines them last."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "made.json"
    made.unlink(missing_ok=True)
    for part, lines in (("items", item_rows(shape)), ("interactions", interaction_rows(shape))):
        with open(folder / f"{part}.csv", "w", encoding="utf-8") as file:
            file.writelines(lines)
    made.write_text(json.dumps(asdict(shape)))


def is_made(shape: Shape, folder: Path) -> bool:
    """Return whether the folder has these tables."""
    made = folder / "made.json"
    return made.is_file() and json.loads(made.read_text()) == asdict(shape)


# ---- The measurements


def command(folder: Path, split: str) -> list[str]:
    """Return the command line that prepares a dataset from the tables."""
    files = ["--interactions", folder / "interactions.csv", "--items", folder / "items.csv"]
    ways = [word for pair in DROP.items() for word in pair]
    line = [*files, *ways, "--drop-unknown", *SPLITS[split], "--domain", "products"]
    return [sys.executable, "-m", "prepare.table", *map(str, [*line, "--out", folder / split])]


def measured(line: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, its CPU seconds and its peak memory in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(line)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    if status:
        raise InputError(
            f"prepare.table failed with exit status {os.waitstatus_to_exitcode(status)}"
        )
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e9


def main() -> None:
    """Make the tables, and print a line for each split."""
    settings = parse_settings(Settings, __doc__)
    shape, folder = settings.shape, settings.folder
    if not is_made(shape, folder):
        print(
            f"Making {shape.rows:,} interactions and {shape.items:,} items in {folder}", flush=True
        )
        # In a process of its own: a child's peak memory counts that of the parent at its start.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_tables, args=(shape, folder)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise InputError(f"{folder}: the tables could not be made")

    rows = [(split, *measured(command(folder, split))) for split in settings.splits]
    sizes = [(folder / f"{part}.csv").stat().st_size / 1e9 for part in ("interactions", "items")]
    what = f"{shape.rows:,} interactions of {shape.users:,} users ({sizes[0]:.2f} GB)"
    print(f"\n{what}, {shape.items:,} items ({sizes[1]:.2f} GB), times as {shape.times}")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, one process")
    print(f"{'split':<8}{'seconds':>10}{'CPU seconds':>14}{'peak GB':>10}")
    for split, took, cpu, peak in rows:
        print(f"{split:<8}{took:>10.0f}{cpu:>14.0f}{peak:>10.2f}")


if __name__ == "__main__":
    run_main(main)
