"""Which columns of a table are meant: those that are named, else those with the usual names."""

import re
from collections.abc import Sequence

from prepare.rows import Rows
from trsr import InputError

# Lower-case letters and digits only; the first one that a table has is taken.
USER = (
    "userid",
    "user",
    "uid",
    "reviewerid",
    "customerid",
    "memberid",
    "visitorid",
    "accountid",
    "personid",
    "authorid",
    "username",
    "sessionid",
    "session",
)
ITEM = (
    "itemid",
    "item",
    "iid",
    "parentasin",
    "asin",
    "productid",
    "movieid",
    "bookid",
    "newsid",
    "articleid",
    "trackid",
    "songid",
    "recipeid",
    "gameid",
    "appid",
    "businessid",
    "gmapid",
    "videoid",
    "sku",
)
ITEM_OF_ITEMS = (*ITEM, "id")  # in the file of the items, a plain id is the item's
TIME = (
    "timestamp",
    "time",
    "unixreviewtime",
    "unixtime",
    "eventtime",
    "datetime",
    "date",
    "createdat",
    "reviewtime",
    "ts",
)
TEXT = (
    "title",
    "name",
    "itemname",
    "productname",
    "brand",
    "store",
    "category",
    "categories",
    "maincategory",
    "subcategory",
    "genre",
    "genres",
    "description",
    "desc",
    "abstract",
    "overview",
    "summary",
    "synopsis",
    "author",
    "authors",
    "artist",
    "album",
    "director",
    "publisher",
    "manufacturer",
    "tags",
    "features",
    "color",
    "size",
    "material",
    "model",
)
RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")  # what may follow a colon in a header


def bare(column: str) -> str:
    """Return a column's name without RecBole's type: `user_id` of `user_id:token`."""
    name, _, kind = column.rpartition(":")
    return name if kind in RECBOLE_TYPES else column


def plain(column: str) -> str:
    """Return a column's name in lower-case letters and digits: `userid` of `User ID`."""
    return re.sub("[^a-z0-9]", "", bare(column).lower())


def named(rows: Rows, asked: str, flag: str) -> str:
    """Return the column that a flag names, with or without RecBole's type; InputError if none."""
    found = [column for column in rows.columns if asked in (column, bare(column))]
    if not found:
        columns = ", ".join(rows.columns)
        what = f"no column {asked!r}, which {flag} names; the columns are {columns}"
        raise InputError(f"{rows.path}{rows.heading}: {what}")
    return found[0]


def usual(rows: Rows, names: Sequence[str], what: str, flag: str) -> str:
    """Return the first column with one of the usual names; InputError if there is none."""
    columns = {plain(column): column for column in reversed(rows.columns)}
    if found := [columns[name] for name in names if name in columns]:
        return found[0]
    listed = ", ".join(rows.columns)
    # Names are rarely numbers: then the first row has been taken for them.
    numbers = any(re.fullmatch(r"[\d.]+", column.strip()) for column in rows.columns)
    hint = "; does the file lack a header line?" if numbers else ""
    if len(rows.columns) == 1 and (other := re.search(r"[;|\t]|::", rows.columns[0])):
        hint = f"; is the table separated by {other[0]!r}? Save it with commas"
    problem = f"no column has a usual name of {what}; name it with {flag}"
    raise InputError(f"{rows.path}{rows.heading}: {problem} (the columns are {listed}){hint}")


def find(rows: Rows, asked: str | None, names: Sequence[str], what: str, flag: str) -> str:
    """Return the column of what: the one asked for, else the one with a usual name."""
    return usual(rows, names, what, flag) if asked is None else named(rows, asked, flag)


def find_texts(rows: Rows, asked: Sequence[str] | None, id_column: str) -> list[str]:
    """Return the columns whose texts describe an item, in the order of the attributes.

    asked: names; or `all`, for every column but the id and vectors; None for the usual names, in
    the order of the header.
    """
    if asked is None:
        found = [c for c in rows.columns if plain(c) in TEXT and c != id_column]
        if not found:
            usual(rows, TEXT, "a text", "--text COLUMN ..., or --text all")
        return found
    if list(asked) == ["all"] and "all" not in rows.columns:
        others = (c for c in rows.columns if c != id_column and not c.endswith(":float_seq"))
        if found := list(others):
            return found
        what = f"no column but {id_column}; an item needs a text"
        raise InputError(f"{rows.path}{rows.heading}: {what}")
    return list(dict.fromkeys(named(rows, name, "--text") for name in asked))
