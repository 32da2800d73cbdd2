"""Convert your own tables to the project's schema: interactions and items, in any usual form.

    python -m prepare.table --interactions ratings.csv --items movies.csv \\
        --domain movies.json --out data/movies
    python -m prepare.table --print-domain > movies.json    # the words of a domain, to be edited

CSV, TSV, JSON Lines and Parquet, also gzipped. One row per interaction (a user, an item, a time)
and one row per item. Columns with the usual names are found, and said; flags name others. By
default a user's last item is the target, and users are split at random. With --split-time 0.8 0.9
two moments in time divide all users: nothing after the first one is learned from.
"""

from argparse import SUPPRESS, ArgumentTypeError
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from launch.command import option, parse_settings, run_main
from prepare import columns, events, periods
from prepare.common import Item, Options, Session, Source, prepare
from prepare.domains import DOMAINS, PrintDomain, domain_option, find_domain
from prepare.rows import Rows, open_rows
from prepare.tables import attributes, shown_names
from trsr import InputError

ITEM_REPEATS = "rows of an item that is there already"
ITEM_MISSING = "items without an id"


def share(text: str) -> float:
    """Return a number above 0 and below 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ArgumentTypeError(f"expected a number above 0 and below 1, not {text!r}")
    return value


@dataclass(frozen=True)
class Settings(Options):
    """The flags."""

    interactions: Path = option(SUPPRESS, "file of interactions", Path, "tables", required=True)
    items: Path = option(SUPPRESS, "file of items", Path, required=True)
    domain: str = domain_option()
    print_domain: str | None = option(
        None,
        "print a domain's words (products unless named) as JSON, and end",
        nargs="?",
        const=next(iter(DOMAINS)),
        action=PrintDomain,
    )
    user: str | None = option(None, "column of the user (unset: the usual names)", group="columns")
    item: str | None = option(None, "column of the item, in both files")
    id: str | None = option(None, "column of the item in --items, if another one there")
    time: str | None = option(None, "column of the time: numbers, or ISO 8601")
    text: tuple[str, ...] | None = option(
        None, "columns of --items to describe an item by; all: every column", nargs="+"
    )
    duplicates: str = option(
        "keep",
        "an item that its user has had before; drop: keep the first time",
        choices=("keep", "drop", "refuse"),
        group="faults",
    )
    duplicate_items: str = option(
        "refuse", "an item with two rows; first: keep the first", choices=("refuse", "first")
    )
    missing: str = option("refuse", "a row without user, item or time", choices=("refuse", "drop"))
    split: str | None = option(
        None, "last: each user's last item is the target (default)", choices=["last"], group="split"
    )
    split_time: tuple[float, float] | None = option(
        None,
        "the shares of interactions up to the ends of training and validation, as 0.8 0.9",
        share,
        nargs=2,
        metavar=("TRAIN", "VAL"),
    )


@dataclass
class Tables:
    """The two files, their columns, and what is found while they are read."""

    settings: Settings
    interactions: Rows
    items: Rows
    keys: list[str]  # the columns of user, item and time
    id: str
    texts: dict[str, str]  # the column of each attribute
    more: dict = field(default_factory=dict)  # for meta.json
    used: dict[str, list[str]] = field(default_factory=dict)  # by split
    faults: Counter = field(default_factory=Counter)  # of the items, at their last reading

    # -- Items

    def read_items(self) -> Iterator[Item]:
        """Yield the items, without the rows that the flags leave out."""
        self.faults = Counter({ITEM_MISSING: 0, ITEM_REPEATS: 0})
        first_only = self.settings.duplicate_items == "first"
        seen: set[str] = set()
        for number, (item, *texts) in self.items.read([self.id, *self.texts.values()]):
            where = self.items.place(number)
            if events.is_missing(item):
                if self.settings.missing == "refuse":
                    what = f"column {self.id!r} has no value; --missing drop leaves such rows out"
                    raise InputError(f"{where}: {what}")
                self.faults[ITEM_MISSING] += 1
                continue
            if item in seen:
                if not first_only:
                    what = f"item {item!r} is there twice; --duplicate-items first keeps the first"
                    raise InputError(f"{where}: {what}")
                self.faults[ITEM_REPEATS] += 1
                continue
            seen.add(item)
            yield where, item, attributes(zip(self.texts, texts, strict=True))

    # -- Users

    def read_sessions(self, dropped: Counter) -> Iterator[Session]:
        """Yield each user's interactions, by time."""
        settings = self.settings
        dropped.update(self.faults)
        drop_missing = settings.missing == "drop"
        found, times = events.read_events(self.interactions, self.keys, drop_missing, dropped)
        found.take(np.lexsort((found.time, found.user)))  # it is stable
        self.treat_repeats(found, dropped)
        if settings.split_time is None:
            return found.sessions()
        return found.sessions(self.divide(found, times))

    def treat_repeats(self, found: events.Events, dropped: Counter) -> None:
        """Count the repeats, and do with them what --duplicates says; InputError for refuse."""
        repeats, way = found.repeats(), self.settings.duplicates
        n = int(repeats.sum())
        if not n:
            return
        first = int(np.flatnonzero(repeats)[0])
        names = found.items[found.item[first]], found.users[found.user[first]]
        where = f"{found.place(first)}: item {names[0]!r} is there again for user {names[1]!r}"
        if way == "refuse":
            raise InputError(f"{where}; --duplicates keep or drop says what to do with it")
        done = {"keep": "kept", "drop": "dropped but for the first"}[way]
        print(f"{where}; {n:,} such interactions, {done}")
        self.more["repeats"] = n
        if way == "drop":
            dropped[events.REPEATS] = n
            found.take(np.flatnonzero(~repeats))

    def divide(self, found: events.Events, times: events.Times) -> np.ndarray:
        """Return the number of the split in whose time each interaction lies; say the moments."""
        shares = self.settings.split_time
        rows = events.moments(found.time, [Fraction(str(s)) for s in shares])
        first, second = (found.time[row] for row in rows)
        told = [told_moment(times, found.time[row]) for row in rows]
        ends = ("the last of training", "the last of validation")
        for name, moment, fraction in zip(ends, told, shares, strict=True):
            iso = f" ({moment['iso']})" if moment["iso"] else ""
            print(f"{fraction:g} of the interactions are up to {moment['time']}{iso}, {name}")
        if first == second or second == found.time.max():
            what = f"--split-time {shares[0]:g} {shares[1]:g} leaves no time for validation or test"
            raise InputError(f"{self.interactions.path}: {what}; choose other shares")

        self.more["moments"] = told
        numbers = (found.time > first).astype(np.int8) + (found.time > second)
        self.used.update(events.used_by(found, numbers))
        return numbers


def told_moment(times: events.Times, key: int) -> dict:
    """Return a moment as meta.json tells it: as the file has it, and as ISO 8601."""
    row = int(np.flatnonzero(times.keys() == key)[0])
    return {"time": times.text(row), "iso": times.iso(row)}


def open_tables(settings: Settings) -> Tables:
    """Return the tables with their columns, and print the columns; InputError if one is unknown."""
    interactions, items = open_rows(settings.interactions), open_rows(settings.items)
    user = columns.find(interactions, settings.user, columns.USER, "a user", "--user")
    item = columns.find(interactions, settings.item, columns.ITEM, "an item", "--item")
    time = columns.find(interactions, settings.time, columns.TIME, "a time", "--time")

    # Without a flag, the name that the other file has is the first choice.
    usual = (columns.plain(item), *columns.ITEM_OF_ITEMS)
    asked, flag = settings.id or settings.item, "--id" if settings.id else "--item (else --id)"
    id_column = columns.find(items, asked, usual, "an item", flag)
    texts = columns.find_texts(items, settings.text, id_column)
    shown = shown_names(items.path, {columns.bare(name): name for name in texts})
    print(f"columns user={user} item={item} time={time} of {interactions.path.name}")
    print(f"columns item={id_column} text={','.join(texts)} of {items.path.name}")
    if settings.text is None and (unused := unused_columns(items, id_column, texts)):
        print(f"Left out of the items' texts: {', '.join(unused)}; --text takes them")

    tables = Tables(settings, interactions, items, [user, item, time], id_column, shown)
    named = {"user": user, "item": item, "time": time, "id": id_column, "text": texts}
    tables.more["columns"] = named
    return tables


def unused_columns(rows: Rows, id_column: str, texts: Sequence[str]) -> list[str]:
    """Return the columns that no item is described by."""
    return [column for column in rows.columns if column not in (id_column, *texts)]


def main() -> None:
    """Read the tables and write the dataset."""
    settings = parse_settings(Settings, __doc__)
    by_time = settings.split_time is not None
    if by_time and settings.split:
        raise InputError("--split last and --split-time exclude each other")
    if by_time and settings.split_time[0] >= settings.split_time[1]:
        raise InputError("--split-time: the first share must be below the second one")
    name, words = find_domain(settings.domain)
    tables = open_tables(settings)
    filters = [ITEM_MISSING, ITEM_REPEATS, events.MISSING_VALUES, events.REPEATS]
    source = Source(
        "prepare.table",
        name,
        words,
        tables.items,
        tables.interactions,
        items=tables.read_items,
        sessions=tables.read_sessions,
        filters=[*filters, periods.NO_PLACE] if by_time else filters,
        divide=periods.divide_by_time if by_time else None,
        used=tables.used.__getitem__ if by_time else None,
        more=tables.more,
    )
    prepare(settings, source)


if __name__ == "__main__":
    run_main(main)
