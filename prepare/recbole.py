"""RecBole atomic files, in which many public datasets are shared, to the project's schema.

    python -m prepare.recbole --inter games.inter --item games.item --out data/games --domain products

The .inter file holds a session a row (user_id, item_id_list, item_id: the target) or an event a row (user_id, item_id,
timestamp: the last one is the target); its header tells. Every column of the .item file becomes an attribute, but for
those of type float_seq, which are vectors.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from launch.command import run_main
from prepare.common import Item, Session, Table, attributes, prepare, script_parser
from prepare.domains import DOMAINS
from trsr import InputError

TYPES = ("token", "token_seq", "float", "float_seq")


def typed_columns(table: Table, required: tuple[str, ...]) -> dict[str, str]:
    """Return {name: `name:type`} of the header; InputError for another form or where a required name is missing."""
    columns = {}
    for column in table.columns:
        name, _, kind = column.rpartition(":")
        if not name or kind not in TYPES:
            raise InputError(
                f"{table.path}:1: column {column!r} is not name:type with a type of {', '.join(TYPES)}"
            )
        columns[name] = column
    if missing := [name for name in required if name not in columns]:
        raise InputError(
            f"{table.path}:1: no column {missing[0]!r}; found {', '.join(table.columns)}"
        )
    return columns


def read_items(table: Table, columns: dict[str, str]) -> Iterator[Item]:
    """Yield the items with all columns but the id and vectors as attributes: release_year becomes `Release year`."""
    texts = [
        name
        for name, column in columns.items()
        if name != "item_id" and not column.endswith(":float_seq")
    ]
    names = {(name[:1].upper() + name[1:]).replace("_", " "): name for name in texts}
    for where, row in table:
        yield (
            where,
            row[columns["item_id"]],
            attributes((shown, row[columns[name]]) for shown, name in names.items()),
        )


def read_sessions(table: Table, columns: dict[str, str]) -> Iterator[Session]:
    """Yield the sessions of a file with a session a row."""
    for where, row in table:
        history = row[columns["item_id_list"]].split()
        yield Session([where], row[columns["user_id"]], history, row[columns["item_id"]])


def read_events(table: Table, columns: dict[str, str]) -> Iterator[Session]:
    """Yield a session a user of a file with an event a row, by time; events of one time stay in order."""
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


def main(argv: list[str] | None = None) -> None:
    """Read RecBole atomic files and write the dataset."""
    parser = script_parser("RecBole atomic files to the project's schema.", "users")
    flag = parser.add_argument_group("RecBole").add_argument
    flag(
        "--inter",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="file with the interactions",
    )
    flag("--item", type=Path, required=True, default=argparse.SUPPRESS, help="file with the items")
    flag(
        "--domain",
        choices=sorted(DOMAINS),
        required=True,
        default=argparse.SUPPRESS,
        help="what the items are",
    )
    args = parser.parse_args(argv)
    item, inter = Table(args.item), Table(args.inter)
    in_sessions = any(column.startswith("item_id_list:") for column in inter.columns)
    read = read_sessions if in_sessions else read_events
    columns = typed_columns(
        inter, ("user_id", "item_id", "item_id_list" if in_sessions else "timestamp")
    )
    attributes_of = typed_columns(item, ("item_id",))
    if vectors := [column for column in item.columns if column.endswith(":float_seq")]:
        print(f"Left out of the items' texts: {', '.join(vectors)}")
    prepare(
        args,
        args.domain,
        [item, inter],
        lambda: read_items(item, attributes_of),
        lambda dropped: read(inter, columns),
    )


if __name__ == "__main__":
    run_main(main)
