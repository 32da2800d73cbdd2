"""Convert RecBole's atomic files, a common form of public datasets, to the project's schema.

    python -m prepare.recbole --inter g.inter --item g.item --domain products --out data/games

The .inter file holds either one session per row (user_id, item_id_list, and item_id, the target) or
one event per row (user_id, item_id, timestamp; a user's last event is the target). Its header says
which. Every column of the .item file becomes an attribute, except those of type float_seq, which
are vectors.
"""

from argparse import SUPPRESS
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from launch.command import option, parse_settings, run_main
from prepare.common import Item, Options, Session, Source, prepare
from prepare.domains import domain_option, find_domain
from prepare.tables import Table, attributes, shown_names
from trsr import InputError

OTHER_ROWS = "rows of a user other than the one taken"
ROWS = ("last", "first", "all")
TYPES = ("token", "token_seq", "float", "float_seq")


@dataclass(frozen=True)
class Settings(Options):
    """The flags."""

    inter: Path = option(SUPPRESS, "file with the interactions", Path, "RecBole", required=True)
    item: Path = option(SUPPRESS, "file with the items", Path, required=True)
    domain: str = domain_option()
    rows: str = option(
        "last", "which of a user's session rows count; all: each as a user of its own", choices=ROWS
    )


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


def attribute_columns(table: Table, columns: dict[str, str]) -> dict[str, str]:
    """Return the column of each attribute; InputError if two columns become the same attribute."""
    shown = {
        name: column
        for name, column in columns.items()
        if name != "item_id" and not column.endswith(":float_seq")
    }
    return shown_names(table.path, shown)


def read_items(table: Table, columns: dict[str, str]) -> Iterator[Item]:
    """Yield the items; the column release_year becomes the attribute `Release year`."""
    columns_of = attribute_columns(table, columns)
    for where, row in table:
        texts = attributes((shown, row[column]) for shown, column in columns_of.items())
        yield where, row[columns["item_id"]], texts


def read_sessions(
    table: Table, columns: dict[str, str], rows: str, dropped: Counter
) -> Iterator[Session]:
    """Yield the sessions of a file with one per row: a user's last row, first row, or all rows.

    RecBole's own files often have a row for every item of a user; the last one has the longest
    history. With all rows, a user's second row becomes a user named USER#2.
    """
    user_of, counts = columns["user_id"], Counter()
    totals = Counter(row[user_of] for _, row in table)
    for where, row in table:
        user = row[user_of]
        counts[user] += 1
        wanted = {"last": totals[user], "first": 1}.get(rows, counts[user])
        if counts[user] != wanted:
            dropped[OTHER_ROWS] += 1
            continue
        name = f"{user}#{counts[user]}" if rows == "all" and counts[user] > 1 else user
        yield Session([where], name, row[columns["item_id_list"]].split(), row[columns["item_id"]])


def read_events(table: Table, columns: dict[str, str]) -> Iterator[Session]:
    """Yield one session per user of a file of events, by time; simultaneous events keep order."""
    users: dict[str, list[tuple[Decimal, str, str]]] = {}
    for where, row in table:
        text = row[columns["timestamp"]]
        # As decimals, since whole numbers above 2^53 would lose their order as floats.
        try:
            time = Decimal(text)
        except InvalidOperation:
            time = Decimal("nan")
        if not time.is_finite():
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
    in_sessions = any(column.startswith("item_id_list:") for column in inter.columns)
    third = "item_id_list" if in_sessions else "timestamp"
    inter_columns = typed_columns(inter, ("user_id", "item_id", third))
    item_columns = typed_columns(item, ("item_id",))
    attribute_columns(item, item_columns)

    def sessions(dropped: Counter) -> Iterator[Session]:
        if in_sessions:
            return read_sessions(inter, inter_columns, settings.rows, dropped)
        return read_events(inter, inter_columns)

    if vectors := [column for column in item.columns if column.endswith(":float_seq")]:
        print(f"Left out of the items' texts: {', '.join(vectors)}")

    source = Source(
        "prepare.recbole",
        *find_domain(settings.domain),
        item,
        inter,
        items=lambda: read_items(item, item_columns),
        sessions=sessions,
        filters=[OTHER_ROWS] if in_sessions else [],
    )
    prepare(settings, source)


if __name__ == "__main__":
    run_main(main)
