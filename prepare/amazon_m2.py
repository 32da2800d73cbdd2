"""Convert Amazon-M2, the paper's product dataset (section 5.1), to the project's schema.

    python -m prepare.amazon_m2 --raw DIR --out data/amazon-m2
    python -m prepare.amazon_m2 --raw DIR --out data/amazon-m2-de --locale DE

The raw folder holds products_train.csv and sessions_train.csv as published (KDD Cup 2023). A
session is a user, named by its locale and its row number from 1, such as UK-17. The paper counts
ten attributes: the nine here and the id, which carries no text.
"""

import re
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.command import option, parse_settings, run_main
from prepare.common import Item, Options, Session, Source, prepare
from prepare.domains import domain_option, find_domain
from prepare.tables import Table, attributes, split_csv
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
# Lists are printed NumPy arrays: no commas, and line breaks if they are long.
IDS = re.compile(r"\s*\[\s*(?:'[^'\s]+'\s*)*\]\s*")
OTHER_LOCALE = "sessions of other locales"


@dataclass(frozen=True)
class Settings(Options):
    """The flags."""

    raw: Path = option(
        SUPPRESS,
        "folder with products_train.csv and sessions_train.csv",
        Path,
        "Amazon-M2",
        required=True,
    )
    domain: str = domain_option("products")
    locale: str = option("UK", "the shop's country; the paper uses UK")


def of_locale(table: Table, locale: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the table's rows of one locale; InputError, which lists the others, if it has none."""
    found: set[str] = set()
    for where, row in table:
        found.add(row["locale"])
        if row["locale"] == locale:
            yield where, row
    if locale not in found:
        there = ", ".join(sorted(found)) or "no row at all"
        what = f"no row of locale {locale!r}; found {there}; choose another --locale"
        raise InputError(f"{table.path}: {what}")


def read_products(table: Table, locale: str) -> Iterator[Item]:
    """Yield the products of one locale; in another, an id may have other texts."""
    for where, row in of_locale(table, locale):
        texts = attributes((name, row[column]) for name, column in ATTRIBUTES.items())
        yield where, row["id"], texts


def read_sessions(table: Table, locale: str, dropped: Counter) -> Iterator[Session]:
    """Yield the sessions of one locale."""
    n_read = 0
    for where, row in of_locale(table, locale):
        n_read += 1
        history = parse_ids(row["prev_items"], where)
        yield Session([where], f"{locale}-{table.rows}", history, row["next_item"])
    dropped[OTHER_LOCALE] = table.rows - n_read


def parse_ids(text: str, where: str) -> list[str]:
    """Return the ids of `['B09W9FND7K' 'B09JSPLN1M']`; InputError for a text of another form."""
    if not IDS.fullmatch(text):
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        what = f"{shown!r} is no list like ['B09W9FND7K' 'B09JSPLN1M']"
        raise InputError(f"{where}: column 'prev_items': {what}")
    return ID.findall(text)


def main() -> None:
    """Read Amazon-M2 and write the dataset."""
    settings = parse_settings(Settings, __doc__)
    raw, locale = settings.raw, settings.locale
    products = Table(raw / "products_train.csv", PRODUCTS, split=split_csv)
    sessions = Table(raw / "sessions_train.csv", SESSIONS, split=split_csv)
    source = Source(
        "prepare.amazon_m2",
        *find_domain(settings.domain),
        products,
        sessions,
        items=lambda: read_products(products, locale),
        sessions=lambda dropped: read_sessions(sessions, locale, dropped),
        filters=[OTHER_LOCALE],
    )
    prepare(settings, source)


if __name__ == "__main__":
    run_main(main)
