"""Amazon-M2, the product dataset of the paper (section 5.1), to the project's schema.

    python -m prepare.amazon_m2 --raw DIR --out data/amazon-m2
    python -m prepare.amazon_m2 --raw DIR --out data/amazon-m2-de --locale DE

The folder holds products_train.csv and sessions_train.csv as published (KDD Cup 2023). A session is a user, named by
its locale and the number of its row, from 1: UK-17. The ten attributes of the paper are these nine and the id, which
carries no text.
"""

import argparse
import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from launch.command import run_main
from prepare.common import Item, Session, Table, attributes, prepare, script_parser
from trsr import InputError

ATTRIBUTES = {
    "Title": "title",
    "Price": "price",
    "Brand": "brand",
    "Color": "color",
    "Size": "size",
    "Model": "model",
    "Material": "material",
    "Author": "author",
    "Description": "desc",
}
PRODUCTS = ("id", "locale", *ATTRIBUTES.values())
SESSIONS = ("prev_items", "next_item", "locale")
ID = re.compile(r"'([^'\s]+)'")
IDS = re.compile(
    r"\s*\[\s*(?:'[^'\s]+'\s*)*\]\s*"
)  # a NumPy array's text: no commas, and line breaks in long ones
FIELD_LIMIT = (
    2**24
)  # characters; an opening quote without its end fails here instead of swallowing the file
OTHER_LOCALE = "sessions of other locales"


def split_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, columns) of comma-separated rows, which may span lines within quotes."""
    csv.field_size_limit(FIELD_LIMIT)
    reader, number = csv.reader(lines, strict=True), 1
    try:
        for fields in reader:
            yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}:{number}: not comma-separated text ({error}); is the file whole?"
        ) from None


def of_locale(table: Table, locale: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the table's rows of one locale; InputError, with the locales that there are, where there is none."""
    found: set[str] = set()
    for where, row in table:
        found.add(row["locale"])
        if row["locale"] == locale:
            yield where, row
    if locale not in found:
        there = ", ".join(sorted(found)) or "no row at all"
        raise InputError(
            f"{table.path}: no row of locale {locale!r}; found {there}; choose another --locale"
        )


def read_products(table: Table, locale: str) -> Iterator[Item]:
    """Yield the products of one locale; an id stands for other texts in another."""
    for where, row in of_locale(table, locale):
        yield (
            where,
            row["id"],
            attributes((name, row[column]) for name, column in ATTRIBUTES.items()),
        )


def read_sessions(table: Table, locale: str, dropped: Counter) -> Iterator[Session]:
    """Yield the sessions of one locale."""
    n_read = 0
    for where, row in of_locale(table, locale):
        n_read += 1
        yield Session(
            [where], f"{locale}-{table.rows}", parse_ids(row["prev_items"], where), row["next_item"]
        )
    dropped[OTHER_LOCALE] = table.rows - n_read


def parse_ids(text: str, where: str) -> list[str]:
    """Return the ids of `['B09W9FND7K' 'B09JSPLN1M']`; InputError for a text of another form."""
    if not IDS.fullmatch(text):
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise InputError(
            f"{where}: column 'prev_items': {shown!r} is no list like ['B09W9FND7K' 'B09JSPLN1M']"
        )
    return ID.findall(text)


def main(argv: list[str] | None = None) -> None:
    """Read Amazon-M2 and write the dataset."""
    parser = script_parser("Amazon-M2 to the project's schema.", "sessions")
    flag = parser.add_argument_group("Amazon-M2").add_argument
    flag(
        "--raw",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder with products_train.csv and sessions_train.csv",
    )
    flag("--locale", default="UK", help="the shop's country; the paper takes UK")
    args = parser.parse_args(argv)
    products = Table(args.raw / "products_train.csv", PRODUCTS, split=split_csv)
    sessions = Table(args.raw / "sessions_train.csv", SESSIONS, split=split_csv)
    prepare(
        args,
        "products",
        [products, sessions],
        lambda: read_products(products, args.locale),
        lambda dropped: read_sessions(sessions, args.locale, dropped),
        [OTHER_LOCALE],
    )


if __name__ == "__main__":
    run_main(main)
