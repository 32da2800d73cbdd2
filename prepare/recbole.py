"""RecBole's atomic files, a form that many public datasets come in, to the project's schema.

    python -m prepare.recbole --inter g.inter --item g.item --domain products --out data/games

The .inter file holds either one session per row (user_id, item_id_list, and item_id, the target) or
one event per row (user_id, item_id, timestamp; a user's last event is the target). Its header says
which. Every column of the .item file becomes an attribute, except those of type float_seq, which
are vectors.
"""

import math
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.command import option, parse_settings, run_main
from prepare.common import Item, Options, Session, Source, prepare
from prepare.domains import DOMAINS
from prepare.tables import Table, attributes
from trsr import InputError

TYPES = ("token", "token_seq", "float", "float_seq")


@dataclass(frozen=True)
class Settings(Options):
    """The flags."""

    inter: Path = option(SUPPRESS, "file with the interactions", Path, "RecBole", required=True)
    item: Path = option(SUPPRESS, "file with the items", Path, required=True)
    domain: str = option(SUPPRESS, "what the items are", choices=sorted(DOMAINS), required=True)


def typed_columns(table: Table, required: tuple[str, ...]) -> dict[str, str]:
    """Return {name: `name:type`} of the header.

    Raises InputError for a column of another form, and if a required name is missing.
    """
    columns = {}
    for column in table.columns:
        name, _, kind = column.rpartition(":")
        if not name or kind not in TYPES:
            what = f"column {column!r} is not name:type with a type of {', '.join(TYPES)}"
            raise InputError(f"{table.path}:1: {what}")
        columns[name] = column
    if missing := [name for name in required if name not in columns]:
        what = f"no column {missing[0]!r}; found {', '.join(table.columns)}"
        raise InputError(f"{table.path}:1: {what}")
    return columns


def read_items(table: Table, columns: dict[str, str]) -> Iterator[Item]:
    """Yield the items; the column release_year becomes the attribute `Release year`."""
    columns_of = {}
    for name, column in columns.items():
        if name != "item_id" and not column.endswith(":float_seq"):
            columns_of[(name[:1].upper() + name[1:]).replace("_", " ")] = column
    for where, row in table:
        texts = attributes((shown, row[column]) for shown, column in columns_of.items())
        yield where, row[columns["item_id"]], texts


def read_sessions(table: Table, columns: dict[str, str]) -> Iterator[Session]:
    """Yield the sessions of a file with one per row."""
    for where, row in table:
        history = row[columns["item_id_list"]].split()
        yield Session([where], row[columns["user_id"]], history, row[columns["item_id"]])


def read_events(table: Table, columns: dict[str, str]) -> Iterator[Session]:
    """Yield one session per user of a file of events, by time; simultaneous events keep order."""
    users: dict[str, list[tuple[float, str, str]]] = {}
    for where, row in table:
        text = row[columns["timestamp"]]
        try:
            time = float(text)
        except ValueError:
            time = math.nan
        if not math.isfinite(time):
            raise InputError(f"{where}: column 'timestamp': {text!r} is no number")
        users.setdefault(row[columns["user_id"]], []).append((time, row[columns["item_id"]], where))
    for user, events in users.items():
        events.sort(key=lambda event: event[0])
        _, items, places = zip(*events, strict=True)
        yield Session(places, user, list(items), None)


def main() -> None:
    """Read RecBole's atomic files and write the dataset."""
    settings = parse_settings(Settings, __doc__)
    item, inter = Table(settings.item), Table(settings.inter)
    read, third = read_events, "timestamp"
    if any(column.startswith("item_id_list:") for column in inter.columns):
        read, third = read_sessions, "item_id_list"
    inter_columns = typed_columns(inter, ("user_id", "item_id", third))
    item_columns = typed_columns(item, ("item_id",))
    if vectors := [column for column in item.columns if column.endswith(":float_seq")]:
        print(f"Left out of the items' texts: {', '.join(vectors)}")

    source = Source(
        settings.domain,
        item,
        inter,
        items=lambda: read_items(item, item_columns),
        sessions=lambda dropped: read(inter, inter_columns),
    )
    prepare(settings, source)


if __name__ == "__main__":
    run_main(main)
